//! A port as QEMU has it: the guest's end stays, hosts are plugged in one after another and cut off at any byte.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

pub struct Port {
    line: Arc<Mutex<DuplexStream>>,
    plugged: Option<JoinHandle<()>>,
}

impl Port {
    /// The port and the guest's end.
    pub fn new() -> (Self, DuplexStream) {
        let (guest, line) = duplex(10_000);
        (
            Self {
                line: Arc::new(Mutex::new(line)),
                plugged: None,
            },
            guest,
        )
    }

    /// Cuts the host there is, losing what is under way, and gives the end for a new one.
    pub async fn plug(&mut self) -> DuplexStream {
        if let Some(plugged) = self.plugged.take() {
            plugged.abort();
            let _cancelled = plugged.await;
        }
        let (host, relayed) = duplex(3_000);
        let line = self.line.clone();
        self.plugged = Some(tokio::spawn(async move {
            let mut line = line.lock().await;
            let (from_guest, to_guest) = split(&mut *line);
            let (from_host, to_host) = split(relayed);
            tokio::join!(copy(from_guest, to_host), copy(from_host, to_guest));
        }));
        host
    }
}

/// Unlike `tokio::io::copy`, does not close the target at the end.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut bytes = [0; 1777];
    loop {
        match from.read(&mut bytes).await {
            Ok(read @ 1..) if to.write_all(&bytes[..read]).await.is_ok() => {}
            _ => return,
        }
    }
}
