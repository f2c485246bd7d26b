//! A circuit breaker for each VMM: one that answers nothing any more holds no further callers. Knows no protocol.
//!
//! ```text
//! closed ──TIMEOUTS in a row──► open ──PAUSE later, one call is let through──► open for another PAUSE
//!   ▲                                                                           │
//!   └────────────────────────── any answer, also a refusal ◄────────────────────┘
//! ```

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Error, MachineDir};

/// Calls in a row that get no answer in time until no more are made.
const TIMEOUTS: u32 = 3;
/// Until the next one is tried then.
const PAUSE: Duration = Duration::from_secs(5);

/// What is known of one VMM's answers. Time is passed in.
#[derive(Debug, Default)]
struct Breaker {
    timeouts: u32,
    /// Nobody is let through before; `None` while closed.
    until: Option<Instant>,
}

impl Breaker {
    /// Whether a call may be made; else how long none may. A call that is let through and never reports back, since
    /// its caller gave up, costs another pause and nothing more.
    fn admit(&mut self, now: Instant) -> Result<(), Duration> {
        match &mut self.until {
            Some(until) if now < *until => Err(*until - now),
            Some(until) => {
                *until = now + PAUSE;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn timed_out(&mut self, now: Instant) {
        self.timeouts = self.timeouts.saturating_add(1);
        if self.timeouts >= TIMEOUTS {
            self.until = Some(now + PAUSE);
        }
    }
}

/// The breakers of all machines of a runtime. Only machines whose VMM is silent have one.
#[derive(Debug, Default)]
pub(crate) struct Breakers(Mutex<HashMap<PathBuf, Breaker>>);

impl Breakers {
    /// Makes a call to the VMM of `dir`, unless it is known to answer none.
    ///
    /// # Errors
    /// [`Error::Hung`] at once, or what the call says; its [`Error::Timeout`] counts as silence, as does a socket
    /// whose queue is full.
    pub(crate) async fn guard<T>(
        &self,
        dir: &MachineDir,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        if let Some(breaker) = self.all().get_mut(dir.path()) {
            breaker.admit(Instant::now()).map_err(|again| Error::Hung {
                dir: dir.path().to_owned(),
                seconds: again.as_secs() + 1,
            })?;
        }
        let result = call.await;
        if result.as_ref().err().is_some_and(is_silence) {
            let mut all = self.all();
            let breaker = all.entry(dir.path().to_owned()).or_default();
            breaker.timed_out(Instant::now());
        } else {
            self.forget(dir);
        }
        result
    }

    /// For a VMM that is new or gone.
    pub(crate) fn forget(&self, dir: &MachineDir) {
        self.all().remove(dir.path());
    }

    fn all(&self) -> MutexGuard<'_, HashMap<PathBuf, Breaker>> {
        // Nothing panics while it is held, and no state between two statements is wrong.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_silence(error: &Error) -> bool {
    match error {
        Error::Timeout { .. } => true,
        Error::Io { source, .. } => source.kind() == ErrorKind::WouldBlock,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_silences_in_a_row_and_lets_one_through_per_pause() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..TIMEOUTS {
            assert_eq!(breaker.admit(start), Ok(()));
            breaker.timed_out(start);
        }
        assert_eq!(breaker.admit(start), Err(PAUSE));
        let later = start + PAUSE;
        assert_eq!(
            breaker.admit(later - Duration::from_millis(1)),
            Err(Duration::from_millis(1))
        );
        assert_eq!(breaker.admit(later), Ok(()));
        assert_eq!(breaker.admit(later), Err(PAUSE), "one at a time");
        // That one never reported back.
        assert_eq!(breaker.admit(later + PAUSE), Ok(()));
        breaker.timed_out(later + 2 * PAUSE);
        assert_eq!(breaker.admit(later + 2 * PAUSE), Err(PAUSE));
    }

    fn silence() -> Result<(), Error> {
        Err(Error::Timeout {
            what: "test",
            seconds: 1,
        })
    }

    #[tokio::test]
    async fn a_silent_vmm_holds_nobody_and_no_other_vmm() {
        let breakers = Breakers::default();
        let (silent, other) = (MachineDir::new("/m/1"), MachineDir::new("/m/2"));
        for _ in 0..TIMEOUTS {
            let _ = breakers.guard(&silent, async { silence() }).await;
        }
        let never = std::future::pending::<Result<(), Error>>();
        let error = breakers.guard(&silent, never).await.unwrap_err();
        assert!(matches!(error, Error::Hung { .. }), "{error}");
        assert_eq!(error.kind(), hutch_contract::error::Kind::Unavailable);
        assert!(error.hint().is_some());
        breakers.guard(&other, async { Ok(()) }).await.unwrap();
        // A new run of the machine begins with a clean sheet.
        breakers.forget(&silent);
        breakers.guard(&silent, async { Ok(()) }).await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_an_answer() {
        let breakers = Breakers::default();
        let dir = MachineDir::new("/m/1");
        for _ in 0..3 * TIMEOUTS {
            for _ in 0..TIMEOUTS - 1 {
                let _ = breakers.guard(&dir, async { silence() }).await;
            }
            let refused = async {
                Err::<(), _>(Error::Monitor {
                    command: "test",
                    answer: "no".to_owned(),
                })
            };
            let error = breakers.guard(&dir, refused).await.unwrap_err();
            assert!(matches!(error, Error::Monitor { .. }), "{error}");
        }
    }
}
