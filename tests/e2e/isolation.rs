//! An ordinary user, and what a guest of theirs cannot reach.

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hutch_tests::{Lab, Runtime, is_root, lab};

/// Nobody's number on any distribution.
const SOMEBODY: u32 = 54_321;

fn as_somebody(lab: Lab) -> Lab {
    if is_root() { lab.user(SOMEBODY) } else { lab }
}

#[tokio::test]
async fn an_ordinary_user_runs_a_command_with_qemu() {
    let lab = as_somebody(lab!(Runtime::Qemu));
    let ran = lab
        .hutch(&["run", "--embedded", "busybox", "--", "uname", "-a"])
        .await;
    assert!(ran.stdout.starts_with("Linux "), "{ran}");
    let host = std::fs::read_to_string("/proc/version").unwrap();
    let kernel = host.split(' ').nth(2).unwrap();
    assert!(!ran.good().contains(kernel), "that is the host's kernel");
    lab.finish().await;
}

#[tokio::test]
async fn a_guest_reaches_nothing_of_the_host_with_qemu() {
    let api = free_port();
    let lab = as_somebody(lab!(Runtime::Qemu));
    let lab = lab
        .env("HUTCH_LISTEN", &format!("127.0.0.1:{api}"))
        .start()
        .await;
    lab.busybox().await;
    lab.create("caged").await;

    let reached = Arc::new(AtomicU32::new(0));
    let on_loopback = count_connections(Ipv4Addr::LOCALHOST, reached.clone());
    let everywhere = count_connections(Ipv4Addr::UNSPECIFIED, reached.clone());
    // The listeners and the API do answer, where they may.
    for port in [on_loopback, everywhere, api] {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    // Whatever the guest was given, it takes what would reach the host if anything did.
    let setup = "ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; \
                 ip route add default via 10.0.2.2; ip addr show dev eth0";
    let card = lab.sh("caged", setup).await;
    assert!(
        card.stdout.contains("10.0.2.15"),
        "the test needs the guest's card: {card:?}"
    );
    // A listener in the guest, to show that its tools work.
    let control = "nc -l -p 7777 </dev/null >/dev/null & sleep 1; nc -w 3 127.0.0.1 7777 </dev/null && echo reached";
    let control = lab.sh("caged", control).await;
    assert_eq!(control.stdout, "reached\n", "{control:?}");

    let mut hosts = vec![
        "10.0.2.2".to_owned(),
        "10.0.2.3".to_owned(),
        "127.0.0.1".to_owned(),
    ];
    hosts.extend(own_address());
    for host in &hosts {
        for port in [on_loopback, everywhere, api] {
            let tried = lab
                .sh("caged", &format!("nc -w 2 {host} {port} </dev/null"))
                .await;
            assert_ne!(tried.exit.exit_code, 0, "{host}:{port} {tried:?}");
        }
        let tried = lab
            .sh(
                "caged",
                &format!("wget -T 2 -q -O - http://{host}:{api}/health"),
            )
            .await;
        assert_ne!(tried.exit.exit_code, 0, "{host} {tried:?}");
    }
    assert_eq!(
        reached.load(Ordering::SeqCst),
        2,
        "connections beside the two of the test"
    );
    lab.finish().await;
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// A listener that counts who comes.
fn count_connections(address: Ipv4Addr, count: Arc<AtomicU32>) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for _ in listener.incoming() {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    port
}

/// The host's address towards others, if it has one. Nothing is sent to find out.
fn own_address() -> Option<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(("192.0.2.1", 9)).ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then(|| address.to_string())
}
