//! Machines whose network card is a tap. Each test has a network of its own, in which it is the host.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;

use hutch_runtime::{Error, Nic};

use crate::lab::{self, GENEROUS, Guest, Lab, descriptors, is_root};
use crate::world::ip;
use crate::{scripted, sys};

/// What all guests here are called, on taps that only they are on.
const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 5);
/// The host, on every tap.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
/// Of the host's end of every tap, so that a guest's neighbours stay the same when its tap does not.
const GATEWAY_MAC: &str = "0a:00:a9:fe:00:01";
const MAC: [u8; 6] = [0x06, 0, 0xac, 0x10, 0, 5];

/// Runs a test in a network of its own, or says why it does not.
pub fn isolated<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let lacks = if !is_root() {
        "root"
    } else if std::fs::File::open("/dev/net/tun").is_err() {
        "/dev/net/tun"
    } else if Command::new("ip").arg("-Version").output().is_err() {
        "ip"
    } else {
        // The namespace is this thread's: others run other tests.
        let thread = std::thread::spawn(|| {
            sys::own_network().unwrap();
            ip("link set lo up");
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().build().unwrap().block_on(test());
        });
        return thread.join().unwrap();
    };
    println!("skipped: taps in a network namespace need {lacks}");
}

/// Makes a tap for the machine's user, up and with the host's address on it.
pub fn tap(lab: &Lab, name: &str) -> Nic {
    let uid = lab.spec.user.unwrap().uid;
    ip(&format!("tuntap add {name} mode tap vnet_hdr user {uid}"));
    ip(&format!("link set {name} address {GATEWAY_MAC} up"));
    ip(&format!("address add {GATEWAY}/32 dev {name}"));
    Nic::Tap {
        name: name.to_owned(),
        mac: MAC,
    }
}

/// Leads packets to the guest to this tap.
pub fn route_to(tap: &str) {
    ip(&format!("route replace {GUEST}/32 dev {tap}"));
}

/// A packet that the guest sends reaches its host, and the other way round, each with its answer.
pub async fn meets_its_host(guest: &mut Guest) {
    let answer = guest.ask(&format!("echo {GATEWAY}")).await;
    assert_eq!(answer, "answered");
    let host = UdpSocket::bind((GATEWAY, 0)).unwrap();
    host.connect((GUEST, 9)).unwrap();
    host.set_read_timeout(Some(GENEROUS)).unwrap();
    host.send(b"is anybody there?").unwrap();
    // Nobody is, and the guest says so.
    let error = host.recv(&mut [0; 64]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
}

/// A machine on a tap of its own label, whose guest has an address.
pub async fn on_a_tap(lab: &mut Lab) -> (hutch_runtime::Process, Guest) {
    let name = lab.spec.label.clone();
    lab.spec.nic = tap(lab, &name);
    route_to(&name);
    let process = lab.start().await;
    let mut guest = lab.guest().await;
    let route = guest.ask(&format!("route {GUEST} {GATEWAY}")).await;
    assert_eq!(route, "routed");
    (process, guest)
}

macro_rules! with_a_tap {
    ($($runtime:ident)*) => { $(mod $runtime {
        #[test]
        fn a_machine_has_the_card_it_was_given() {
            super::isolated(async || {
                let name = stringify!($runtime).replace('_', "-");
                if let Some(lab) = super::Lab::new(&name).await {
                    super::a_machine_has_the_card_it_was_given(lab).await;
                }
            });
        }
    })* };
}

with_a_tap! { qemu firecracker cloud_hypervisor }

mod jailed {
    #[test]
    fn a_machine_has_the_card_it_was_given() {
        super::isolated(async || {
            if let Some(lab) = super::Lab::jailed().await {
                super::a_machine_has_the_card_it_was_given(lab).await;
            }
        });
    }
}

async fn a_machine_has_the_card_it_was_given(mut lab: Lab) {
    assert!(lab.runtime.capabilities().network);
    let (process, mut guest) = on_a_tap(&mut lab).await;
    let card = guest.ask("card").await;
    assert!(card.contains(" link/ether 06:00:ac:10:00:05 "), "{card}");
    meets_its_host(&mut guest).await;

    // The VMM has it, and its shim has not.
    let taps = |pid| {
        let all = descriptors(pid);
        all.iter().filter(|(_, kind)| kind == "tun").count()
    };
    assert_ne!(taps(process.pid()), 0);
    assert_eq!(taps(process.shim_pid().unwrap()), 0);

    process.kill().await.unwrap();
    lab.left_nothing().await;
    // It is there for the next start, and free.
    let link = ip(&format!("link show {}", lab.spec.label));
    assert!(link.contains("NO-CARRIER"), "{link}");
}

/// A VMM that is never started, of each runtime that takes taps.
async fn scripted() -> [Lab; 3] {
    let body = "touch started; exec sleep 600";
    [
        scripted::lab("qemu", "QEMU emulator version 7.2.22", body).await,
        scripted::lab("firecracker", "Firecracker v1.16.1", body).await,
        scripted::lab("cloud-hypervisor", "cloud-hypervisor v53.0", body).await,
    ]
}

async fn refused(lab: &Lab, words: &str) {
    let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
    let said = lab::in_words(&error);
    assert!(said.contains(words), "{said}");
    assert!(!lab.dir.file("started").exists(), "the VMM was started");
    lab.left_nothing().await;
}

#[test]
fn a_tap_that_is_not_the_machines_is_refused() {
    isolated(async || {
        for mut lab in scripted().await {
            let name = lab.spec.label.clone();
            let user = lab::spec(&name).user.unwrap();
            let open = format!("open the tap {name}");
            for its_user in [Some(user), None] {
                lab.spec.user = its_user;
                lab.spec.nic = Nic::Tap {
                    name: name.clone(),
                    mac: MAC,
                };
                refused(&lab, &format!("{open}: it is missing")).await;
                let all = ip("-brief link show");
                assert!(!all.contains(&name), "it was made: {all}");
            }
            lab.spec.user = Some(user);
            let anothers = user.uid + 1;
            ip(&format!("tuntap add {name} mode tap user {anothers}"));
            refused(
                &lab,
                &format!("{open}: it is missing or belongs to another"),
            )
            .await;
            ip(&format!("link delete {name}"));
            ip(&format!("link add {name} type bridge"));
            refused(&lab, &format!("{open}: an interface of another kind")).await;
            ip(&format!("link delete {name}"));
            lab.spec.nic = Nic::Tap {
                name: "h%d".to_owned(),
                mac: MAC,
            };
            refused(&lab, "has no tap \"h%d\"").await;
        }
    });
}

#[tokio::test]
async fn a_runtime_without_taps_says_so() {
    for name in ["docker", "virtualbox"] {
        let mut lab = Lab::bare(name);
        assert!(!lab.runtime.capabilities().network);
        lab.spec.nic = Nic::Tap {
            name: lab.spec.label.clone(),
            mac: MAC,
        };
        let error = lab.runtime.start(&lab.dir, &lab.spec).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert_eq!(error.to_string(), format!("{name} cannot use a tap"));
        assert!(!lab.dir.file("run").exists(), "nothing was started");
    }
}
