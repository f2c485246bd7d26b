//! QEMU's command line. Paths are relative to the machine's directory, sockets are descriptors, and what a guest can
//! see has a fixed order and explicit names.

use super::acceleration::Acceleration;
use super::{AGENT_FD, EVENTS_FD, MEMORY_FD, MONITOR_FD, PASST_FD, STATE_FD, TAP_FD};
use crate::{MachineDir, MachineSpec, Nic, kernel_line, sys, tap};

/// MiB of translated code that TCG keeps. Its default is a gigabyte, which a guest fills in time; a kernel's boot
/// and a busy user space stay below this.
pub(super) const TCG_CODE_MIB: u32 = 128;

/// Everything after the program's name. `goes_on`: from a snapshot, whose memory and state it finds under their numbers.
pub(super) fn arguments(
    spec: &MachineSpec,
    acceleration: &Acceleration,
    has_modules: bool,
    goes_on: bool,
) -> Vec<String> {
    let mut all = Vec::new();
    let mut add = |option: &str, value: &str| {
        all.push(format!("-{option}"));
        if !value.is_empty() {
            all.push(value.to_owned());
        }
    };
    add("nodefaults", "");
    add("no-user-config", "");
    // A guest's reboot ends the process: starting it again is ours to do.
    add("no-reboot", "");
    add("display", "none");
    add(
        "sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    add("name", &escaped(&spec.label));
    // With a second I/O APIC, which emulation gets by default, interrupts of devices on the low buses never arrive
    // (seen with 7.2). Without it all devices have lines of the first one, with KVM and without.
    let machine = "microvm,acpi=on,rtc=on,ioapic2=off";
    if goes_on {
        add("machine", &format!("{machine},memory-backend=ram"));
        let file = format!("mem-path=/proc/self/fd/{MEMORY_FD},share=off");
        let size = format!("size={}M", spec.memory_mib);
        add(
            "object",
            &format!("memory-backend-file,id=ram,{size},{file}"),
        );
        add("incoming", &format!("fd:{STATE_FD}"));
        // It executes once it is told to. What `xen-save-devices-state` writes has no description of the machine.
        add("S", "");
        add("global", "migration.send-configuration=off");
    } else {
        add("machine", machine);
    }
    match acceleration {
        Acceleration::Kvm => {
            add("accel", "kvm");
            add("cpu", "host");
        }
        Acceleration::Tcg { .. } => {
            add("accel", &format!("tcg,thread=multi,tb-size={TCG_CODE_MIB}"));
            add("cpu", "max");
        }
    }
    add("smp", &spec.vcpu.to_string());
    add("m", &format!("{}M", spec.memory_mib));
    add("kernel", MachineDir::KERNEL);
    add("initrd", MachineDir::INITRAMFS);
    add("append", &kernel_line(spec, acceleration, has_modules));

    let socket = |id: &str, fd: i32| format!("socket,id={id},fd={fd}");
    add("chardev", "stdio,id=console,mux=off,signal=off");
    add("serial", "chardev:console");
    add(
        "chardev",
        &format!("{},server=on,wait=off", socket("qmp", MONITOR_FD)),
    );
    add("mon", "chardev=qmp,mode=control");
    add("chardev", &socket("events", EVENTS_FD));
    add("mon", "chardev=events,mode=control");

    add("global", "virtio-mmio.force-legacy=false");
    for (name, value) in devices(spec, has_modules) {
        add(name, &value);
    }
    all
}

/// The devices that a guest sees, in their order. Each has its bus, so that one that is missing moves no other.
fn devices(spec: &MachineSpec, has_modules: bool) -> Vec<(&'static str, String)> {
    let bus = |n: u32| format!("bus=virtio-mmio-bus.{n}");
    let disk = |id: &str, file: &str, more: &str| {
        let locked = format!("file.driver=file,file.filename={file},file.locking=on");
        (
            "blockdev",
            format!("driver=raw,node-name={id},{locked},{more}"),
        )
    };
    let mut all = vec![
        disk("root", MachineDir::DISK, "discard=unmap"),
        (
            "device",
            format!(
                "virtio-blk-device,id=root-disk,drive=root,serial=root,{}",
                bus(0)
            ),
        ),
    ];
    if has_modules {
        all.push(disk("modules", MachineDir::MODULES, "read-only=on"));
        all.push((
            "device",
            format!(
                "virtio-blk-device,id=modules-disk,drive=modules,serial=modules,{}",
                bus(1)
            ),
        ));
    }
    match &spec.nic {
        Nic::None => {}
        Nic::Restricted => {
            // `ipv6=off`: what `restrict` closes is tested for IPv4.
            all.push(("netdev", "user,id=net,restrict=on,ipv6=off".to_owned()));
            all.push((
                "device",
                format!("virtio-net-device,id=nic,netdev=net,{}", bus(2)),
            ));
        }
        Nic::Tap { mac, .. } => {
            // Without vhost the host's kernel reads no queue of the guest's.
            all.push(("netdev", format!("tap,id=net,fd={TAP_FD},vhost=off")));
            let mac = tap::mac(mac);
            // A saved state goes on only where a tap can do what this one could, and UFO is what kernels differ in.
            let card = "virtio-net-device,id=nic,netdev=net,mq=off,host_ufo=off,guest_ufo=off";
            all.push(("device", format!("{card},mac={mac},{}", bus(2))));
        }
        Nic::Filtered(network) => {
            let stream = format!("stream,id=net,server=off,addr.type=fd,addr.str={PASST_FD}");
            all.push(("netdev", stream));
            let card = "virtio-net-device,id=nic,netdev=net,mq=off";
            let mac = tap::mac(&network.mac);
            all.push(("device", format!("{card},mac={mac},{}", bus(2))));
        }
    }
    all.extend([
        (
            "chardev",
            format!("socket,id=agent,fd={AGENT_FD},server=on,wait=off"),
        ),
        (
            "device",
            format!("virtio-serial-device,id=channel,max_ports=2,{}", bus(3)),
        ),
        (
            "device",
            "virtserialport,id=agent-port,chardev=agent,bus=channel.0,nr=1,name=hutch.agent"
                .to_owned(),
        ),
        ("object", "rng-builtin,id=random".to_owned()),
        (
            "device",
            format!("virtio-rng-device,id=rng,rng=random,{}", bus(4)),
        ),
    ]);
    all
}

/// The kernel's command line.
fn kernel_line(spec: &MachineSpec, acceleration: &Acceleration, has_modules: bool) -> String {
    let mut words: Vec<String> = [
        // By a triple fault.
        "reboot=t",
        "hutch.channel=virtio-serial:hutch.agent",
        "hutch.root=serial:root",
    ]
    .map(str::to_owned)
    .to_vec();
    if has_modules {
        words.push("hutch.modules=serial:modules".to_owned());
    }
    if let Acceleration::Tcg { .. } = acceleration {
        // Where a hypervisor's processor is no boundary anyway, the guest need not pay for its own.
        words.push("mitigations=off".to_owned());
        #[cfg(target_arch = "x86_64")]
        // Without it a third of all boots hangs in measuring the counter against an emulated timer.
        words.push(format!("tsc_early_khz={}", sys::tsc_khz()));
    }
    kernel_line::kernel_line(words, spec)
}

/// QEMU ends a value at a comma and takes two for one.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCG: Acceleration = Acceleration::Tcg { because: None };

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "mch-1".into(),
            label: "hab12-7".into(),
            vcpu: 2,
            memory_mib: 256,
            kernel_args: vec!["extra=1,2".into()],
            nic: Nic::Restricted,
            user: None,
        }
    }

    fn values<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
        let pairs = arguments.windows(2);
        let matching = pairs.filter(|pair| pair[0] == option);
        matching.map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn confinement_is_always_asked_for() {
        for acceleration in [Acceleration::Kvm, TCG] {
            let all = arguments(&spec(), &acceleration, true, false);
            for option in ["-nodefaults", "-no-user-config", "-no-reboot"] {
                assert!(all.iter().any(|argument| argument == option), "{option}");
            }
            let sandbox = values(&all, "-sandbox");
            assert_eq!(
                sandbox,
                ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
            );
            assert!(!all.iter().any(|argument| argument == "-runas"));
            let mons = values(&all, "-mon");
            assert!(
                mons.iter().all(|mon| mon.ends_with("mode=control")),
                "{mons:?}"
            );
            let disks = values(&all, "-blockdev");
            assert!(
                disks.iter().all(|disk| disk.starts_with("driver=raw,")),
                "{disks:?}"
            );
            assert!(
                !all.iter().any(|argument| argument.contains("path=")),
                "{all:?}"
            );
        }
    }

    #[test]
    fn the_device_list_of_version_1() {
        let all = arguments(&spec(), &TCG, true, false);
        assert_eq!(
            values(&all, "-device"),
            [
                "virtio-blk-device,id=root-disk,drive=root,serial=root,bus=virtio-mmio-bus.0",
                "virtio-blk-device,id=modules-disk,drive=modules,serial=modules,bus=virtio-mmio-bus.1",
                "virtio-net-device,id=nic,netdev=net,bus=virtio-mmio-bus.2",
                "virtio-serial-device,id=channel,max_ports=2,bus=virtio-mmio-bus.3",
                "virtserialport,id=agent-port,chardev=agent,bus=channel.0,nr=1,name=hutch.agent",
                "virtio-rng-device,id=rng,rng=random,bus=virtio-mmio-bus.4",
            ]
        );
        assert_eq!(
            values(&all, "-netdev"),
            ["user,id=net,restrict=on,ipv6=off"]
        );
    }

    #[test]
    fn a_tap_is_a_descriptor_and_stands_where_any_card_does() {
        let nic = Nic::Tap {
            name: "hab12-7".into(),
            mac: [0x06, 0, 0xac, 0x10, 0, 5],
        };
        let all = arguments(&MachineSpec { nic, ..spec() }, &TCG, true, false);
        assert_eq!(values(&all, "-netdev"), ["tap,id=net,fd=6,vhost=off"]);
        assert_eq!(
            values(&all, "-device")[2],
            "virtio-net-device,id=nic,netdev=net,mq=off,host_ufo=off,guest_ufo=off,mac=06:00:ac:10:00:05,\
             bus=virtio-mmio-bus.2"
        );
    }

    #[test]
    fn a_user_mode_network_is_a_descriptor_too() {
        let nic = Nic::Filtered(crate::UserNet {
            program: "/usr/bin/passt".into(),
            mac: [2, 0, 0, 0, 0, 5],
            address: [172, 16, 0, 5].into(),
            gateway: [169, 254, 0, 1].into(),
            gateway_mac: [2, 0, 0, 0, 0, 1],
            dns: true,
            refuse: Vec::new(),
        });
        let all = arguments(&MachineSpec { nic, ..spec() }, &TCG, true, false);
        assert_eq!(
            values(&all, "-netdev"),
            ["stream,id=net,server=off,addr.type=fd,addr.str=7"]
        );
        assert_eq!(
            values(&all, "-device")[2],
            "virtio-net-device,id=nic,netdev=net,mq=off,mac=02:00:00:00:00:05,bus=virtio-mmio-bus.2"
        );
    }

    #[test]
    fn one_that_goes_on_has_the_same_devices_and_waits() {
        let all = |goes_on| arguments(&spec(), &TCG, true, goes_on);
        let (boots, goes_on) = (all(false), all(true));
        for option in ["-device", "-cpu", "-smp", "-m", "-accel", "-blockdev"] {
            assert_eq!(values(&boots, option), values(&goes_on, option));
        }
        assert!(goes_on.iter().any(|argument| argument == "-S"));
        assert!(!boots.iter().any(|argument| argument == "-S"));
        let its = values(&boots, "-machine")[0];
        let machine = values(&goes_on, "-machine");
        assert_eq!(machine, [format!("{its},memory-backend=ram")]);
        let objects = values(&goes_on, "-object");
        assert!(
            objects[0].ends_with(",mem-path=/proc/self/fd/8,share=off"),
            "{objects:?}"
        );
    }

    #[test]
    fn a_device_that_is_missing_moves_no_other() {
        let with = arguments(&spec(), &TCG, true, false);
        let without = arguments(
            &MachineSpec {
                nic: Nic::None,
                ..spec()
            },
            &TCG,
            false,
            false,
        );
        let (with, without) = (values(&with, "-device"), values(&without, "-device"));
        assert_eq!(without.len(), with.len() - 2);
        assert!(without.iter().all(|device| with.contains(device)));
    }

    #[test]
    fn the_kernel_is_told_what_its_host_is() {
        let line = |acceleration| {
            values(&arguments(&spec(), acceleration, false, false), "-append")[0].to_owned()
        };
        let (kvm, tcg) = (line(&Acceleration::Kvm), line(&TCG));
        assert!(tcg.contains(" tsc_early_khz="), "{tcg}");
        assert!(tcg.contains(" mitigations=off"), "{tcg}");
        assert!(
            !kvm.contains("tsc_early_khz") && !kvm.contains("mitigations"),
            "{kvm}"
        );
        assert!(kvm.ends_with(" extra=1,2"), "{kvm}");
        assert!(!kvm.contains("hutch.modules"), "{kvm}");
    }
}
