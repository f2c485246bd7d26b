//! Keeps listening on every port of the host that was given to a machine, and on no other.

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::Duration;

use futures::future::join_all;
use hutch_engine::{Engine, Published};
use hutch_gateway::tcp::{Forward, Forwarder};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Between two attempts at a port that something else on the host has.
const AGAIN: Duration = Duration::from_secs(2);

/// Runs until `closing`; then every port is let go, and connections through it are cut.
pub(crate) async fn keep(engine: Engine, forwarder: Forwarder, closing: CancellationToken) {
    let mut changes = engine.published_changes();
    let mut open: HashMap<Published, Forward> = HashMap::new();
    let mut refused: HashMap<Published, String> = HashMap::new();
    loop {
        changes.borrow_and_update();
        let wanted: HashSet<Published> = engine.published().into_iter().collect();
        let gone: Vec<_> = open.extract_if(|port, _| !wanted.contains(port)).collect();
        close(gone).await;
        refused.retain(|port, _| wanted.contains(port));
        for port in wanted {
            if open.contains_key(&port) {
                continue;
            }
            match listen(&engine, &forwarder, &port).await {
                Ok(forward) => {
                    info!(address = %forward.address(), machine = %port.machine, port = port.guest_port, "forwarded");
                    engine.note_port(&port, Ok(()));
                    refused.remove(&port);
                    open.insert(port, forward);
                }
                Err(error) => {
                    let reason = error.to_string();
                    engine.note_port(&port, Err(reason.clone()));
                    if refused.get(&port) != Some(&reason) {
                        warn!(port = port.host_port, bind = %port.bind, machine = %port.machine, reason, "cannot listen yet");
                        refused.insert(port, reason);
                    }
                }
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                break;
            },
            () = tokio::time::sleep(AGAIN), if !refused.is_empty() => {}
            () = closing.cancelled() => break,
        }
    }
    close(open.into_iter().collect()).await;
}

/// On the socket that was bound when the port was given, else on a new one.
async fn listen(engine: &Engine, forwarder: &Forwarder, port: &Published) -> io::Result<Forward> {
    let listener = match engine.take_listener(port) {
        Some(bound) => TcpListener::from_std(bound)?,
        None => TcpListener::bind((port.bind, port.host_port)).await?,
    };
    forwarder.forward(listener, port.machine.as_str(), port.guest_port)
}

async fn close(gone: Vec<(Published, Forward)>) {
    let closing = gone.into_iter().map(|(port, forward)| async move {
        let connections = forward.connections();
        forward.close().await;
        debug!(port = port.host_port, connections, "let go");
    });
    join_all(closing).await;
}
