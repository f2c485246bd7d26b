//! The step from a process that is alive to a machine that runs: its agent answers and has its identity.

use std::time::{Duration, Instant};

use hutch_contract::record::{MachineRecord, Observed, Wanted};
use hutch_guest::session::{Configure, Session};
use hutch_runtime::{Channel, Root};
use tokio::time::{sleep, timeout};
use tracing::info;

use super::{Body, Driver, blocking, in_words, retry_delay};
use crate::{Error, deadline, keys, plan, prepare};

impl Driver {
    /// Lets it execute where it was paused, reaches the agent, gives it its identity where it has none, and records that the machine runs.
    pub(super) async fn greet(&mut self, record: &MachineRecord) -> Result<(), Error> {
        if !matches!(self.body, Body::Alive(_)) {
            return Ok(());
        }
        self.go_on().await?;
        let Body::Alive(process) = &self.body else {
            return Ok(());
        };
        let (ran, booted) = (plan::came_to_run(record), self.booted);
        let limit = if ran && !booted {
            deadline::RECONNECT
        } else if self.warm.is_some() {
            deadline::WARM
        } else {
            Duration::from_millis(self.shared.config.boot_timeout_ms)
        };
        let started = Instant::now();
        let session = tokio::select! {
            session = self.connect(limit) => session?,
            report = process.wait() => {
                let how = self.last_words(&report).await;
                self.ended(report.exit);
                return if ran { Ok(()) } else { Err(Error::EndedWhileBooting { how }) };
            }
        };
        self.clock.phase("agent", started);
        let session = self.keep_as_template(record, session).await?;
        let started = Instant::now();
        let mut unapplied = record.unapplied.clone();
        // A copy says of itself what its parent was told; it hears who it is before anything of the user's runs in it.
        let copied = record.resume_from.is_some() && !ran;
        if !session.hello().configured || copied {
            let identity = self.identity(record);
            let reply = session.configure(&identity).await?;
            unapplied = reply
                .into_iter()
                .map(|row| format!("{}: {}", row.field, row.reason))
                .collect();
            if self.runtime.root() == Root::Elsewhere {
                unapplied.push("image: this runtime's machines are made from what the server's configuration names".into());
            }
            self.clock.phase("configure", started);
        } else if record.observed != Observed::Running
            || session.hello().quiesced
            || self.may_be_paused
        {
            // Its clock stood still, or all of it; or another server ended while it was being frozen.
            session.thaw(self.shared.now_ms() as i64).await?;
        }
        let (timings, warm) = (self.clock.list(), self.warm.is_some());
        self.machine
            .cell
            .update(|record| {
                record.observed = Observed::Running;
                record.failed_starts = 0;
                record.exit = None;
                record.resume_from = None;
                if booted || !ran {
                    record.starts += 1;
                    record.started_at_ms = Some(self.shared.now_ms());
                    record.timings = timings;
                    record.warm = warm;
                }
                record.unapplied = unapplied;
                if record.wanted == Wanted::Running && !record.restart {
                    record.served = record.generation;
                }
                Ok(())
            })
            .await?;
        self.booted = false;
        self.warm = None;
        self.may_be_paused = false;
        if record.observed == Observed::Absent {
            self.release_origin(record).await;
        }
        if booted || !ran {
            self.running_since = Some(Instant::now());
            info!(machine = %record.id, name = %record.name, "running");
        }
        self.machine.uses.touch();
        self.machine.session.send_replace(Some(session));
        Ok(())
    }

    /// Opens a session, again and again until `limit`: the VMM or the guest may still be on its way up.
    pub(super) async fn connect(&self, limit: Duration) -> Result<Session, Error> {
        let end = tokio::time::Instant::now() + limit;
        let mut attempt = 0;
        loop {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            match timeout(left, self.open_session(left)).await {
                Ok(Ok(session)) => return Ok(session),
                Ok(Err(error)) => {
                    tracing::debug!(machine = %self.machine.cell.id, error = %error.chain(), "no session yet");
                    attempt += 1;
                    let pause = retry_delay(attempt).min(Duration::from_secs(2));
                    if tokio::time::Instant::now() + pause >= end {
                        return Err(error);
                    }
                    sleep(pause).await;
                }
                Err(_) => {
                    let name = self.machine.name();
                    return Err(Error::AgentSilent { name });
                }
            }
        }
    }

    async fn open_session(&self, limit: Duration) -> Result<Session, Error> {
        match self.runtime.channel(&self.dir).await? {
            Channel::Wire(stream) => {
                let stream = hutch_guest::link::connect(stream, limit).await?;
                Ok(Session::open(stream, limit).await?)
            }
            Channel::Connection(stream) => Ok(Session::open(stream, limit).await?),
        }
    }

    fn identity(&self, record: &MachineRecord) -> Configure {
        let network = self.shared.network();
        let plug = network.plug(record, self.runtime.as_ref());
        Configure {
            machine_id: record.id.to_string(),
            boot_nonce: keys::random_bytes::<16>(),
            hostname: Some(record.name.to_string()),
            environment: record.env.clone(),
            entropy: keys::random_bytes::<64>().to_vec(),
            clock_unix_ms: self.shared.now_ms() as i64,
            grow_root: true,
            ..plug.identity
        }
    }

    async fn last_words(&self, report: &hutch_runtime::ExitReport) -> String {
        let dir = self.dir.clone();
        let console = blocking("read the console", move || Ok(prepare::console_tail(&dir)))
            .await
            .unwrap_or_default();
        let mut how = in_words(&report.exit);
        for words in [report.stderr_tail.as_str(), console.as_str()] {
            if !words.is_empty() {
                how.push_str("; ");
                how.push_str(words);
            }
        }
        how
    }
}
