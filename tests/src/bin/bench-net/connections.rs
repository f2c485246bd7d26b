//! Many connections through ports of machines, held open together.

use std::net::Ipv4Addr;
use std::time::Instant;

use futures::StreamExt;
use hutch_tests::resident_kib;

use crate::client::Connection;
use crate::role::Role;

const CONNECTIONS: usize = 2000;
/// So many that no limit of one machine (512) or one client (256) is met.
const MACHINES: usize = 4;
const CLIENTS: usize = 10;
/// At once while they are opened.
const OPENING: usize = 64;

/// All are opened, echo once each, and echo once more when all are open.
pub async fn run() {
    let echo = Role::start(None, &["echo"]);
    let mut forwarder = Role::start(None, &["forwarder", &echo.address(), &MACHINES.to_string()]);
    let mut ports = vec![forwarder.port];
    ports.extend((1..MACHINES).map(|_| forwarder.line().parse::<u16>().unwrap()));
    let before = resident_kib(forwarder.pid());
    let start = Instant::now();
    let open = futures::stream::iter((0..CONNECTIONS).map(|n| {
        let from = Ipv4Addr::new(127, 0, 1, 1 + (n % CLIENTS) as u8);
        let to = (Ipv4Addr::LOCALHOST, ports[n / CLIENTS % MACHINES]).into();
        async move {
            let mut connection = Connection::open(Some(from), to).await?;
            connection.echo(format!("hello {n}").as_bytes()).await?;
            std::io::Result::Ok(connection)
        }
    }));
    let opened: Vec<_> = open.buffer_unordered(OPENING).collect().await;
    let took = start.elapsed();
    let with = resident_kib(forwarder.pid());
    let mut errors = 0;
    let mut held = 0;
    for connection in opened {
        match connection {
            Ok(mut connection) => match connection.echo(b"and again").await {
                Ok(()) => held += 1,
                Err(_) => errors += 1,
            },
            Err(error) => {
                if errors == 0 {
                    println!("connections: the first that failed: {error}");
                }
                errors += 1;
            }
        }
    }
    println!(
        "connections: {CONNECTIONS} through {MACHINES} ports, opened in {:.2} s, {held} echoed, {errors} errors",
        took.as_secs_f64()
    );
    println!(
        "connections: the forwarder's memory {:.1} MiB before, {:.1} MiB with them: {:.1} KiB each",
        before as f64 / 1024.0,
        with as f64 / 1024.0,
        (with - before) as f64 / CONNECTIONS as f64
    );
}
