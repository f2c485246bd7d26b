//! What programs of the host keep for us outside of the data directory, such as a Docker engine its containers and
//! images: found by our instance tag, and removed when nothing is left that it was made for.

use std::collections::HashSet;

use hutch_contract::id::ImageId;
use hutch_runtime::{Outside, Runtime};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::engine::Shared;
use crate::{Engine, Error, Item, deadline};

impl Engine {
    /// Removes what is left of machines and images that are gone: an interrupted delete or create left it. A runtime
    /// that does not answer is left alone; the next start tries again.
    pub(crate) async fn remove_outside_orphans(self) {
        let shared = &self.shared;
        for (runtime, found) in shared.outside().await {
            // Looked at after the list was made: what is being made now has its record already.
            let known: HashSet<String> = {
                let fleet = shared.fleet();
                let machines = fleet.machines.keys().map(ToString::to_string);
                machines
                    .chain(fleet.images.keys().map(ToString::to_string))
                    .collect()
            };
            if !known.contains(&found.of) {
                warn!(
                    runtime = runtime.name(),
                    kind = found.kind,
                    name = found.name,
                    "removing what an interrupted change left"
                );
                remove(runtime.as_ref(), &found).await;
            }
        }
    }

    /// What runtimes keep for this server outside of its directory: the part of the inventory that only they know.
    pub async fn outside(&self) -> Vec<Item> {
        let found = self.shared.outside().await.into_iter();
        let mut items: Vec<_> = found
            .map(|(_, found)| Item {
                kind: found.kind,
                name: found.name,
            })
            .collect();
        items.sort();
        items
    }
}

impl Shared {
    /// After a machine went: it may have been the last user of an image that was deleted before.
    pub(crate) async fn remove_outside_of_gone(&self, image: &ImageId) {
        if !self.fleet().images.contains_key(image) {
            self.remove_outside_of(image.as_str()).await;
        }
    }

    /// Removes what was made for a machine or image that is gone. What is still in use goes with its last user.
    pub(crate) async fn remove_outside_of(&self, id: &str) {
        for (runtime, found) in self.outside().await {
            if found.of == id {
                remove(runtime.as_ref(), &found).await;
            }
        }
    }

    async fn outside(&self) -> Vec<(std::sync::Arc<dyn Runtime>, Outside)> {
        let mut all = Vec::new();
        for runtime in self.runtimes.iter() {
            let listed = timeout(deadline::OUTSIDE, runtime.outside(&self.instance.tag)).await;
            match listed {
                Ok(Ok(found)) => {
                    all.extend(found.into_iter().map(|found| (runtime.clone(), found)))
                }
                // Where there is none, there is nothing of ours.
                Ok(Err(error)) => {
                    tracing::debug!(runtime = runtime.name(), error = %Error::from(error).chain(), "it cannot be asked what it has of ours");
                }
                Err(_) => warn!(
                    runtime = runtime.name(),
                    "it does not say in time what it has of ours"
                ),
            }
        }
        all
    }
}

async fn remove(runtime: &dyn Runtime, found: &Outside) {
    match timeout(deadline::OUTSIDE, runtime.remove_outside(found)).await {
        Ok(Ok(())) => info!(
            runtime = runtime.name(),
            kind = found.kind,
            name = found.name,
            "removed"
        ),
        Ok(Err(error)) => {
            warn!(runtime = runtime.name(), kind = found.kind, name = found.name, error = %Error::from(error).chain(), "cannot be removed; the next start tries again");
        }
        Err(_) => warn!(
            runtime = runtime.name(),
            kind = found.kind,
            name = found.name,
            "is not removed in time; the next start tries again"
        ),
    }
}
