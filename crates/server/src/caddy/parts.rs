//! Caddys of others that have a part of ours: on disk before it is put there, until it is taken out.

use std::time::Duration;

use hutch_engine::{elsewhere, note_elsewhere};
use hutch_gateway::caddy::{self, Admin};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::Config;

/// Between two attempts at a Caddy that does not answer: doubles from the first to the second.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// For a Caddy to give our part back when the server ends. It starts all of its servers anew meanwhile.
const AT_THE_END: Duration = Duration::from_secs(10);

/// Remembers that this Caddy may have our part from now on. When that cannot be, it must not get one.
pub(super) fn note(config: &Config, admin: &Admin) -> Result<(), hutch_engine::Error> {
    let mut all = elsewhere(&config.data_dir)?;
    let admin = admin.to_string();
    if !all.contains(&admin) {
        all.push(admin);
        note_elsewhere(&config.data_dir, &all)?;
    }
    Ok(())
}

/// Takes our part out of every Caddy that an earlier server put it into, but out of `kept`: again and again while one
/// does not answer, until `closing`.
pub(super) async fn take_out_others(
    config: &Config,
    tag: &str,
    kept: Option<&Admin>,
    closing: &CancellationToken,
) {
    let mut wait = AGAIN.0;
    while !take_out(config, tag, kept, wait == AGAIN.0).await {
        tokio::select! {
            () = sleep(wait) => wait = AGAIN.1.min(wait * 2),
            () = closing.cancelled() => return,
        }
    }
}

/// Takes our part out of every Caddy, at the end of a server without machines.
pub(super) async fn take_out_all(config: &Config, tag: &str) {
    let done = timeout(AT_THE_END, take_out(config, tag, None, true)).await;
    if done.is_err() {
        warn!("a Caddy keeps our part, since it takes too long: the next server takes it out");
    }
}

/// One attempt; whether nothing is left to do. `loud`: a failure is news.
async fn take_out(config: &Config, tag: &str, kept: Option<&Admin>, loud: bool) -> bool {
    let noted = match elsewhere(&config.data_dir) {
        Ok(noted) => noted,
        Err(error) => {
            warn!(error = %error.chain(), "our parts in other programs are not known");
            return true;
        }
    };
    let (mut left, mut done) = (Vec::new(), true);
    for address in &noted {
        let Ok(admin) = address.parse::<Admin>() else {
            continue;
        };
        if kept == Some(&admin) {
            left.push(address.clone());
            continue;
        }
        match caddy::remove(&admin, tag).await {
            Ok(true) => info!(%admin, "Caddy has no part of ours any more"),
            Ok(false) => debug!(%admin, "Caddy had no part of ours"),
            Err(error) => {
                if loud {
                    warn!(
                        %admin, %error,
                        "our part of this Caddy's configuration cannot be taken out: it is as soon as that Caddy answers"
                    );
                }
                left.push(address.clone());
                done = false;
            }
        }
    }
    if left != noted
        && let Err(error) = note_elsewhere(&config.data_dir, &left)
    {
        warn!(error = %error.chain(), "it is not noted which Caddys have a part of ours");
    }
    done
}
