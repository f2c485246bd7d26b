//! Looks again and again whether our part is in Caddy's configuration, and puts it there.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::api::{Admin, ApiError};
use super::config::{self, Asking, Through};
use super::own::{self, Life};
use super::{CaddyConfig, Mode, Status};

/// The first wait for a Caddy that is not there; each further one is twice as long, up to the time between two looks.
const FIRST: Duration = Duration::from_millis(100);
/// A Caddy that refuses is asked less often, as each time it starts everything anew: so many times the time between two
/// looks, at most.
const REFUSED: u32 = 4;
/// How often somebody else may change the configuration between our look and our change.
const RACES: usize = 5;

/// Keeps our part in the Caddy at `admin`, and our own alive, until `closing`.
pub(super) async fn keep(
    config: CaddyConfig,
    admin: Admin,
    publish: watch::Sender<Status>,
    closing: CancellationToken,
) {
    let (living, life) = watch::channel(Life::Starting);
    let own = match &config.mode {
        Mode::Existing(_) => None,
        Mode::Own(own) => Some(own.clone()),
    };
    let https_port = config.https_port;
    let keeper = Keeper {
        config,
        admin,
        asking: Asking::Ask,
        refused: false,
        failures: 0,
        life: own.as_ref().map(|_| life),
    };
    let keeping = async {
        tokio::select! {
            () = keeper.run(&publish) => {}
            () = closing.cancelled() => {}
        }
    };
    match own {
        None => keeping.await,
        Some(own) => {
            let supervising = own::supervise(own, https_port, living, &closing);
            tokio::join!(keeping, supervising);
        }
    }
}

/// See [`super::remove`].
pub(super) async fn remove(admin: &Admin, tag: &str) -> Result<bool, ApiError> {
    for _ in 0..RACES {
        let now = admin.config().await?;
        let without = config::remove(&now.value, tag);
        if without == now.value {
            return Ok(false);
        }
        match admin.replace(&now, &without, false).await {
            Err(ApiError::Changed) => {}
            done => return done.map(|()| true),
        }
    }
    Err(ApiError::Changed)
}

struct Keeper {
    config: CaddyConfig,
    admin: Admin,
    asking: Asking,
    /// Caddy took nothing the last time. A Caddy that had no configuration before then shows ours nevertheless (2.6.2,
    /// `changeConfig` in `caddy.go`).
    refused: bool,
    /// In a row.
    failures: u32,
    /// Of our own.
    life: Option<watch::Receiver<Life>>,
}

impl Keeper {
    async fn run(mut self, publish: &watch::Sender<Status>) {
        if let Some(life) = &mut self.life {
            // Until then the one of an earlier run may be there. An error: it ends together with us.
            let _ = life.wait_for(|life| *life != Life::Starting).await;
        }
        loop {
            let (status, wait) = match self.look().await {
                Ok(status) => {
                    self.failures = 0;
                    (status, self.config.check_every)
                }
                Err(error) => {
                    let wait = wait(&error, self.failures, self.config.check_every);
                    self.failures = self.failures.saturating_add(1);
                    let refused = matches!(error, ApiError::Refused { .. });
                    let before = publish.borrow().clone();
                    match before {
                        // Its API starts anew whenever anybody changes anything: once is no news.
                        Status::Up { .. } if self.failures == 1 && !refused => (before, wait),
                        _ => (self.failed(&error), wait),
                    }
                }
            };
            publish.send_if_modified(|before| {
                let is_new = *before != status;
                if is_new {
                    tell(&status);
                    *before = status;
                }
                is_new
            });
            let stirs = async {
                if let Some(life) = &mut self.life
                    && life.changed().await.is_ok()
                {
                    return;
                }
                // There is none of our own, or it ends, and we with it.
                std::future::pending().await
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = stirs => self.failures = 0,
            }
        }
    }

    async fn look(&mut self) -> Result<Status, ApiError> {
        for _ in 0..RACES {
            match self.settle().await {
                Err(ApiError::Changed) => debug!("Caddy's configuration was changed meanwhile"),
                settled => return settled,
            }
        }
        Err(ApiError::Changed)
    }

    async fn settle(&mut self) -> Result<Status, ApiError> {
        let now = self.admin.config().await?;
        let (wanted, through) = match config::put(&now.value, &self.config, self.asking) {
            Ok(put) => put,
            Err(foreign) => return Ok(Status::Foreign(foreign)),
        };
        if self.refused || !config::is_settled(&now.value, &wanted) {
            let replaced = self.admin.replace(&now, &wanted, self.refused).await;
            if let Err(ApiError::Refused { message, .. }) = &replaced {
                if self.asking == Asking::Ask && message.contains("unknown field \"ask\"") {
                    self.asking = Asking::Permission;
                    return Err(ApiError::Changed);
                }
                self.refused = true;
            }
            replaced?;
            self.refused = false;
            info!(admin = %self.admin, "Caddy has our part of its configuration");
        }
        Ok(Status::Up {
            https_port: self.config.https_port,
            shared: through == Through::Theirs,
        })
    }

    fn failed(&self, error: &ApiError) -> Status {
        let life = self.life.as_ref().map(|life| life.borrow().clone());
        match (life, error) {
            (Some(Life::Absent), _) => Status::Absent,
            (Some(Life::Ended { reason, hint }), _) => Status::Down { reason, hint },
            (Some(_), ApiError::Unreachable { .. }) => Status::Starting,
            _ => Status::Down {
                reason: error.to_string(),
                hint: hint(error).to_owned(),
            },
        }
    }
}

fn wait(error: &ApiError, failures: u32, check_every: Duration) -> Duration {
    let times = 1_u32.checked_shl(failures.min(30)).unwrap_or(u32::MAX);
    match error {
        ApiError::Refused { .. } => check_every.saturating_mul(times.min(REFUSED)),
        _ => FIRST.saturating_mul(times).min(check_every),
    }
}

fn tell(status: &Status) {
    match status {
        Status::Starting => {}
        Status::Absent => info!("there is no Caddy"),
        Status::Down { reason, hint } => warn!(reason, hint, "Caddy does not serve machines"),
        Status::Foreign(foreign) => {
            warn!(
                what = foreign.what,
                hint = foreign.hint,
                "Caddy is not changed"
            );
        }
        Status::Up { https_port, shared } => info!(https_port, shared, "Caddy serves machines"),
    }
}

/// What to do about an error.
fn hint(error: &ApiError) -> &'static str {
    match error {
        ApiError::Unreachable { source, .. } => match source.kind() {
            ErrorKind::PermissionDenied => "let this user open the socket of Caddy's admin API",
            _ => "start Caddy, or correct the address of its admin API",
        },
        ApiError::Timeout(_) => "look at Caddy's log, or start it anew",
        ApiError::Broken { .. } => "see what really listens there",
        ApiError::Changed => "see who changes Caddy's configuration all the time",
        ApiError::Refused { status: 403, .. } => {
            "add the address of Caddy's admin API to its `origins`"
        }
        ApiError::Refused { message, .. } => {
            let says = |words: &str| message.contains(words);
            if says("unknown module") || says("module not registered") {
                "build a Caddy with that module: xcaddy build --with MODULE"
            } else if says("address already in use") {
                "end what listens on that port, or choose another one"
            } else if says("permission denied") {
                "run Caddy as a user who may use that port, or choose one above 1023"
            } else {
                "correct what Caddy complains about"
            }
        }
    }
}

#[cfg(test)]
mod tests;
