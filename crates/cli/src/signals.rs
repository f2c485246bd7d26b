//! The signals that tell a command to end.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use crate::error::Error;

/// Signals that follow one another so closely are one: `timeout` and others send theirs to the process and to its group.
const BURST: Duration = Duration::from_millis(500);

/// SIGHUP, SIGINT and SIGTERM, but for those that whoever started us wants ignored, as `nohup` and `&` in a script do.
pub struct Signals {
    listeners: Vec<(u8, Signal)>,
    last: Option<Instant>,
}

impl Signals {
    /// From now on these signals do not end the process by themselves.
    pub fn listen() -> Result<Signals, Error> {
        let mask = ignored_mask();
        let mut listeners = Vec::new();
        for (number, kind) in [
            (1, SignalKind::hangup()),
            (2, SignalKind::interrupt()),
            (15, SignalKind::terminate()),
        ] {
            if mask & (1 << (number - 1)) == 0 {
                let listener = signal(kind).map_err(|source| Error::Process {
                    action: "listen to signals",
                    source,
                })?;
                listeners.push((number, listener));
            }
        }
        Ok(Signals {
            listeners,
            last: None,
        })
    }

    /// The number of the next signal.
    pub async fn next(&mut self) -> u8 {
        if self.listeners.is_empty() {
            return std::future::pending().await;
        }
        loop {
            let waiting = self.listeners.iter_mut().map(|(number, listener)| {
                Box::pin(async move {
                    listener.recv().await;
                    *number
                })
            });
            let number = futures::future::select_all(waiting).await.0;
            if self.last.is_none_or(|last| last.elapsed() > BURST) {
                self.last = Some(Instant::now());
                return number;
            }
        }
    }

    /// Does some work until a signal comes; dropping it must be enough to undo it.
    pub async fn or<T>(
        &mut self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            signal = self.next() => Err(Error::Interrupted { signal }),
            result = work => result,
        }
    }
}

/// Bit n - 1 is set when signal n is ignored (Linux, `proc_pid_status(5)`).
fn ignored_mask() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}
