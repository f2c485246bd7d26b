//! A machine's network: how long the host takes to make it and to take it away, beside how many others.

use std::fs;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::thread;
use std::time::{Duration, Instant};

use hutch_net::address::{Addresses, GATEWAY};
use hutch_net::cidr::Cidr;
use hutch_net::firewall::{Config, Firewall};
use hutch_net::link::Links;
use hutch_net::rules::{Link, Rules};
use hutch_net::tap::Tap;
use hutch_tests::world::World;
use hutch_tests::{Runtime, lab};

use crate::numbers::Times;

const ROUNDS: u16 = 300;
/// Machines that are there already.
const BESIDE: [u16; 3] = [0, 100, 1000];
/// Machines that go at the same time.
const AT_ONCE: u16 = 16;
/// Machines through the server.
const MACHINES: usize = 20;
const LIMIT: Duration = Duration::from_secs(120);
const TAG: &str = "be4c";
const MTU: u32 = 1500;
/// The process id that was given out last in the reader's own namespace of them (`proc_sys_kernel(5)`). Threads count.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// The kernel's part alone, then the server's.
pub async fn run() {
    if !hutch_tests::is_root() {
        println!("taps: SKIPPED: taps and network namespaces take root");
        return;
    }
    // In a namespace of process ids of its own nobody else starts anything: what is counted is exact.
    let mut alone = std::process::Command::new("unshare");
    alone.args(["--pid", "--fork", "--kill-child"]);
    alone
        .arg(std::env::current_exe().unwrap())
        .arg("taps-alone");
    assert!(alone.status().unwrap().success());
    through_the_server().await;
}

/// The role: measures in a world of its own.
pub fn alone(_words: &[&str]) {
    if let Some(world) = World::new() {
        world.on_host(measure);
    }
}

fn owner(slot: u16) -> u32 {
    200_000 + u32::from(slot)
}

fn measure() {
    let network = Cidr::new(Ipv4Addr::new(10, 200, 0, 0).into(), 16);
    let addresses = Addresses::new(TAG, network, [7; 5]).unwrap();
    let mut links = Links::open().unwrap();
    let rules = Rules {
        tag: TAG.into(),
        gateway: GATEWAY,
        dns_port: None,
        host_networks: Vec::new(),
        link: Link::Taps,
    };
    let config = Config {
        rules,
        instance: "bench".into(),
        number: NonZeroU16::new(0xbe4c).unwrap(),
        own: true,
    };
    let mut firewall = Firewall::open(config, Vec::new()).unwrap();
    // As the engine does it: see `crates/engine/src/network/routed.rs`.
    let up = |links: &mut Links, firewall: &mut Firewall, slot| {
        let machine = addresses.machine(slot).unwrap();
        firewall.add(machine.clone()).unwrap();
        links.up(&machine, owner(slot), MTU, "bench").unwrap();
    };
    let down = |links: &mut Links, firewall: &mut Firewall, slot| {
        let label = hutch_net::label(TAG, slot);
        links.down(&label, owner(slot)).unwrap();
        firewall.remove(&label).unwrap();
        firewall.forget_connections(slot).unwrap();
    };
    let mut there = 0;
    for beside in BESIDE {
        while there < beside {
            there += 1;
            up(&mut links, &mut firewall, there);
        }
        let (mut ups, mut downs) = (Times::default(), Times::default());
        let before = last_pid();
        for round in 0..ROUNDS {
            let slot = 2000 + round;
            let start = Instant::now();
            up(&mut links, &mut firewall, slot);
            ups.add(start.elapsed());
            let start = Instant::now();
            down(&mut links, &mut firewall, slot);
            downs.add(start.elapsed());
        }
        let started = last_pid() - before;
        println!(
            "taps: beside {beside:>4} machines: up {}; down {}; {started} programs or threads started in {ROUNDS} rounds",
            ups.shown(),
            downs.shown(),
        );
    }
    let start = Instant::now();
    thread::scope(|scope| {
        for first in 1..=AT_ONCE {
            scope.spawn(move || {
                for slot in (first..=there).step_by(usize::from(AT_ONCE)) {
                    let tap = Tap::new(hutch_net::label(TAG, slot), owner(slot));
                    tap.unwrap().remove().unwrap();
                }
            });
        }
    });
    let each = start.elapsed() / u32::from(there);
    println!(
        "taps: of {there} machines, {AT_ONCE} at once: tap removed {:.3} ms each",
        each.as_secs_f64() * 1000.0
    );
    for slot in 1..=there {
        down(&mut links, &mut firewall, slot);
    }
}

fn last_pid() -> u64 {
    fs::read_to_string(LAST_PID)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// The phase `network` of machines that the server makes, one after the other.
async fn through_the_server() {
    let Some(world) = World::new() else { return };
    let lab = lab!(Runtime::Qemu)
        .inside(&world)
        .env("HUTCH_LOG", "warn")
        .start()
        .await;
    lab.busybox().await;
    let mut times = Times::default();
    for n in 0..MACHINES {
        let machine = lab.create(&format!("net-{n}")).await;
        let phases = machine.timings.iter();
        let phases = phases.filter(|timing| timing.phase == "network");
        times.extend(phases.map(|timing| Duration::from_micros(timing.took_us)));
        let gone = lab.client().delete(machine.id.as_str(), Some(LIMIT)).await;
        gone.unwrap();
    }
    assert_eq!(times.len(), MACHINES, "each machine came to a network");
    println!(
        "taps: the server's phase `network` of {MACHINES} machines with QEMU: {}",
        times.shown()
    );
    lab.finish().await;
}
