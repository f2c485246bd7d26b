//! The kernels, initramfs and modules disks that machines boot with: each made once, in the background or when it is
//! first needed, and waited for by starts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use hutch_image::{BootSet, KernelSource};
use tokio::sync::Mutex;
use tracing::{info, warn};

use crate::drive::blocking;
use crate::{EngineConfig, Error};

/// Makes and remembers boot sets. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Kernel {
    own: Arc<Inner>,
    named: Arc<BTreeMap<String, Arc<Inner>>>,
}

struct Inner {
    cache_dir: PathBuf,
    agent: PathBuf,
    source: KernelSource,
    args: Vec<String>,
    /// Held while it is being made, so that it is made once.
    state: Arc<Mutex<State>>,
}

enum State {
    NotYet,
    Ready(BootSet),
    Failed,
}

impl Kernel {
    pub fn new(config: &EngineConfig) -> Kernel {
        let inner = |source, args: &[String]| {
            Arc::new(Inner {
                cache_dir: config.cache_dir.clone(),
                agent: config.agent.clone(),
                source,
                args: [config.kernels.args.as_slice(), args].concat(),
                state: Arc::new(Mutex::new(State::NotYet)),
            })
        };
        let own = match &config.kernel {
            Some(path) => KernelSource::File {
                path: path.clone(),
                modules: config.kernels.modules.clone(),
            },
            None => KernelSource::Distribution,
        };
        let named = config.kernels.named.iter().map(|(name, kernel)| {
            let source = KernelSource::File {
                path: kernel.path.clone(),
                modules: kernel.modules.clone(),
            };
            (name.clone(), inner(source, &kernel.args))
        });
        Kernel {
            own: inner(own, &[]),
            named: Arc::new(named.collect()),
        }
    }

    /// Begins to make the server's own, so that the first machine does not wait for it.
    pub async fn warm(self) {
        match self.own.get().await {
            Ok(boot_set) => info!(
                release = boot_set.kernel_release,
                "the kernel for guests is ready"
            ),
            Err(error) => {
                warn!(error = %error.chain(), hint = error.hint(), "no kernel for guests")
            }
        }
    }

    /// The boot set of a kernel and what is added to its command line; made now when there is none. Goes on when the
    /// future is dropped: others may wait for the same.
    pub async fn get(&self, name: Option<&str>) -> Result<(BootSet, Vec<String>), Error> {
        let inner = self.inner(name)?;
        Ok((inner.get().await?, inner.args.clone()))
    }

    /// Refuses a name that is none, and a kernel for which the last attempt failed and one more does too. While it is
    /// still being made there is hope.
    pub async fn must_be_possible(&self, name: Option<&str>) -> Result<(), Error> {
        let inner = self.inner(name)?;
        let failed = match inner.state.try_lock() {
            Ok(state) => matches!(*state, State::Failed),
            Err(_) => false,
        };
        if failed {
            inner.get().await.map(drop)
        } else {
            Ok(())
        }
    }

    fn inner(&self, name: Option<&str>) -> Result<&Arc<Inner>, Error> {
        let Some(name) = name else {
            return Ok(&self.own);
        };
        self.named.get(name).ok_or_else(|| Error::NoSuchKernel {
            name: name.chars().take(64).collect(),
            known: self.named.keys().cloned().collect(),
        })
    }
}

impl Inner {
    async fn get(self: &Arc<Self>) -> Result<BootSet, Error> {
        let mut state = self.state.clone().lock_owned().await;
        if let State::Ready(boot_set) = &*state {
            return Ok(boot_set.clone());
        }
        let inner = self.clone();
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

    /// What helps when nothing is known but where the kernel was to come from.
    fn source_hint(&self) -> Option<String> {
        match &self.source {
            KernelSource::File { path, .. } => Some(format!(
                "the configuration names {}: let it name a kernel package or a kernel, or leave it out for the distribution's",
                path.display()
            )),
            KernelSource::Distribution => None,
        }
    }
}
