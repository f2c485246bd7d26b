//! The kernel, initramfs and modules disk that machines boot with: made once in the background, waited for by starts.

use std::path::PathBuf;
use std::sync::Arc;

use hutch_image::{BootSet, KernelSource};
use tokio::sync::Mutex;
use tracing::{info, warn};

use crate::drive::blocking;
use crate::{EngineConfig, Error};

/// Makes and remembers the boot set. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Kernel {
    inner: Arc<Inner>,
}

struct Inner {
    cache_dir: PathBuf,
    agent: PathBuf,
    source: KernelSource,
    /// Held while it is being made, so that it is made once.
    state: Arc<Mutex<State>>,
}

impl Inner {
    /// What helps when nothing is known but where the kernel was to come from.
    fn source_hint(&self) -> Option<String> {
        match &self.source {
            KernelSource::Package(path) => Some(format!(
                "`kernel` names {}: let it name a kernel package, or leave it out for the distribution's",
                path.display()
            )),
            _ => None,
        }
    }
}

enum State {
    NotYet,
    Ready(BootSet),
    Failed,
}

impl Kernel {
    pub fn new(config: &EngineConfig) -> Kernel {
        let source = match &config.kernel {
            Some(path) => KernelSource::Package(path.clone()),
            None => KernelSource::Distribution,
        };
        Kernel {
            inner: Arc::new(Inner {
                cache_dir: config.cache_dir.clone(),
                agent: config.agent.clone(),
                source,
                state: Arc::new(Mutex::new(State::NotYet)),
            }),
        }
    }

    /// Begins to make the boot set, so that the first machine does not wait for it.
    pub async fn warm(self) {
        match self.get().await {
            Ok(boot_set) => info!(
                release = boot_set.kernel_release,
                "the kernel for guests is ready"
            ),
            Err(error) => {
                warn!(error = %error.chain(), hint = error.hint(), "no kernel for guests")
            }
        }
    }

    /// The boot set; made now when there is none. Goes on when the future is dropped: others may wait for the same.
    pub async fn get(&self) -> Result<BootSet, Error> {
        let mut state = self.inner.state.clone().lock_owned().await;
        if let State::Ready(boot_set) = &*state {
            return Ok(boot_set.clone());
        }
        let inner = self.inner.clone();
        blocking("make the boot set", move || {
            *state = State::Failed;
            let mut silent = |_| {};
            let made =
                hutch_image::boot_set(&inner.cache_dir, &inner.agent, &inner.source, &mut silent)
                    .map_err(|error| Error::NoKernel {
                    hint: error.hint().or_else(|| inner.source_hint()),
                    reason: Error::from(error).chain(),
                })?;
            *state = State::Ready(made.clone());
            Ok(made)
        })
        .await
    }

    /// Refuses when the last attempt failed and one more does too. While it is still being made there is hope.
    pub async fn must_be_possible(&self) -> Result<(), Error> {
        let failed = match self.inner.state.try_lock() {
            Ok(state) => matches!(*state, State::Failed),
            Err(_) => false,
        };
        if failed {
            self.get().await.map(drop)
        } else {
            Ok(())
        }
    }
}
