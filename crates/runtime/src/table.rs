//! Which runtimes there are: one row each, the best first.

use std::sync::Arc;

use crate::{Runtime, RuntimeConfig};

/// A runtime by name.
struct Row {
    name: &'static str,
    new: fn(RuntimeConfig) -> Arc<dyn Runtime>,
}

/// In order of preference.
const ROWS: &[Row] = &[
    Row {
        name: crate::firecracker::NAME,
        new: |config| Arc::new(crate::firecracker::Firecracker::new(config)),
    },
    Row {
        name: crate::cloud_hypervisor::NAME,
        new: |config| Arc::new(crate::cloud_hypervisor::CloudHypervisor::new(config)),
    },
    Row {
        name: crate::qemu::NAME,
        new: |config| Arc::new(crate::qemu::Qemu::new(config)),
    },
    // Shares the host's kernel: after the VMMs that need nothing but themselves.
    Row {
        name: crate::docker::NAME,
        new: |config| Arc::new(crate::docker::Docker::new(config)),
    },
    // Needs a VM that its user has made.
    Row {
        name: crate::virtualbox::NAME,
        new: |config| Arc::new(crate::virtualbox::VirtualBox::new(config)),
    },
    // Last, so that tests get it only by name or where nothing else is usable.
    #[cfg(feature = "stub")]
    Row {
        name: crate::stub::NAME,
        new: |config| Arc::new(crate::stub::Stub::new(config)),
    },
];

/// The runtimes of a server.
#[derive(Clone)]
pub struct Runtimes(Arc<[Arc<dyn Runtime>]>);

impl Runtimes {
    /// Makes every runtime that there is, each with the configuration that `config` gives for its name.
    pub fn new(mut config: impl FnMut(&'static str) -> RuntimeConfig) -> Self {
        Self(ROWS.iter().map(|row| (row.new)(config(row.name))).collect())
    }

    /// The names, in order of preference.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ROWS.iter().map(|row| row.name)
    }

    /// All of them, in order of preference.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Runtime>> {
        self.0.iter()
    }

    /// The one of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<dyn Runtime>> {
        self.iter().find(|runtime| runtime.name() == name)
    }

    /// The first that is usable here.
    pub async fn best(&self) -> Option<&Arc<dyn Runtime>> {
        for runtime in self.iter() {
            if runtime.probe().await.usable {
                return Some(runtime);
            }
        }
        None
    }
}
