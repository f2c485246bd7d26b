//! A guest for tests: busybox, a few modules and an `/init` that reads commands from its channel, as a cpio archive.
//!
//! `HUTCH_TEST_KERNEL` names a kernel, `HUTCH_TEST_MODULES` a directory with its modules; `cargo xtask test` sets both.

use std::path::{Path, PathBuf};

/// What a guest is booted with.
pub struct BootSet {
    pub kernel: PathBuf,
    /// The same unpacked, for VMMs that have no boot loader.
    pub elf: PathBuf,
    pub initramfs: Vec<u8>,
}

/// In the order in which they must be loaded.
const MODULES: [&str; 13] = [
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_mmio.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci.ko",
    "virtio_console.ko",
    "failover.ko",
    "net_failover.ko",
    "virtio_net.ko",
    "vsock.ko",
    "vmw_vsock_virtio_transport_common.ko",
    "vmw_vsock_virtio_transport.ko",
];

const INIT: &str = r#"#!/bin/sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in /modules/*.ko; do insmod $module; done
echo "guest boots"
words="$(cat /proc/cmdline)"
case "$words" in
    *hutch.channel=vsock:*)
        port=${words#*hutch.channel=vsock:}
        exec /bin/door guest ${port%% *} /serve
        ;;
esac
# The device's name is its own affair; there is one port.
port=
until [ -c "$port" ]; do
    sleep 0.02
    set -- PORT
    port=$1
done
exec 3<>$port
# Only now: a serial line forgets its settings when nobody has it open.
case $port in /dev/ttyS*) stty raw -echo <&3 ;; esac
while :; do
    /serve <&3 >&3
    # Nobody is connected.
    sleep 0.05
done
"#;

/// Reads commands from its input and answers on its output.
const SERVE: &str = r#"#!/bin/sh
while read -r command argument; do
    case $command in
        ping) echo "pong $argument" ;;
        print) echo "$argument" >/dev/console ;;
        flood)
            yes "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde" | head -c $((argument * 1024)) >/dev/console
            echo done
            ;;
        reach)
            ip link set eth0 up
            ip addr add 10.0.2.15/24 dev eth0
            ip route add default via 10.0.2.2
            if nc -w 3 $argument </dev/null >/dev/null; then echo reached; else echo unreachable; fi
            ;;
        card) echo $(ip -o link show eth0) ;;
        route)
            set -- $argument
            ip link set eth0 up
            ip addr add $1/32 dev eth0
            ip route add $2 dev eth0
            ip route add default via $2
            echo routed
            ;;
        run)
            # Its words are nobody's affair, and its input is not ours.
            (eval "$argument") </dev/null >/dev/null 2>&1
            echo "ended $?"
            ;;
        echo) if ping -c 1 -W 20 $argument >/dev/null; then echo answered; else echo silent; fi ;;
        # As our PID 1 does it.
        poweroff)
            if grep -q hutch.end=reset /proc/cmdline; then
                echo "<0>hutch: power off" >/dev/kmsg
                reboot -f
            fi
            poweroff -f
            ;;
        reboot)
            echo "<0>hutch: reboot" >/dev/kmsg
            reboot -f
            ;;
        reset) echo b >/proc/sysrq-trigger ;;
        panic) echo c >/proc/sysrq-trigger ;;
    esac
done
"#;

/// A guest that listens on `port`, a pattern of names. `None` when something that it is made of is missing.
pub fn boot_set(port: &str) -> Option<BootSet> {
    let kernel = PathBuf::from(std::env::var_os("HUTCH_TEST_KERNEL")?);
    let modules = PathBuf::from(std::env::var_os("HUTCH_TEST_MODULES")?);
    let busybox = std::fs::read("/bin/busybox").ok()?;
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "modules"] {
        archive.add(dir, 0o040_755, b"");
    }
    archive.add("bin/busybox", 0o100_755, &busybox);
    archive.add("bin/sh", 0o120_777, b"busybox");
    archive.add("init", 0o100_755, INIT.replace("PORT", port).as_bytes());
    archive.add("serve", 0o100_755, SERVE.as_bytes());
    let door = std::fs::read(env!("CARGO_BIN_EXE_hutch-stub-vmm")).ok()?;
    archive.add("bin/door", 0o100_755, &door);
    for dir in ["lib", "lib/x86_64-linux-gnu", "lib64"] {
        archive.add(dir, 0o040_755, b"");
    }
    // What the door is linked with.
    for library in [
        "lib64/ld-linux-x86-64.so.2",
        "lib/x86_64-linux-gnu/libc.so.6",
        "lib/x86_64-linux-gnu/libm.so.6",
        "lib/x86_64-linux-gnu/libgcc_s.so.1",
    ] {
        let content = std::fs::read(Path::new("/").join(library)).ok()?;
        archive.add(library, 0o100_755, &content);
    }
    for (n, module) in MODULES.iter().enumerate() {
        let content = std::fs::read(modules.join(module)).ok()?;
        // In the order of a listing.
        archive.add(&format!("modules/{n:02}.ko"), 0o100_644, &content);
    }
    archive.add("TRAILER!!!", 0, b"");
    Some(BootSet {
        elf: kernel.with_file_name("vmlinux"),
        kernel,
        initramfs: archive.bytes,
    })
}

/// The "newc" format, see the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files += 1;
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}
