//! Where disks lie: a pool is mounted at start, kept larger than what is in it, and given back at the end.

use std::path::Path;

use hutch_contract::node::Level;
use hutch_disk::pool::{self, Pool, Settings, Storage};
use tracing::{info, warn};

use crate::drive::blocking;
use crate::engine::{Engine, IMAGES, MACHINES, SNAPSHOTS, Shared, TEMPLATES, UPLOADS};
use crate::{EngineConfig, Error, deadline};

/// A finding without its area: level, words, hint.
type Found = (Level, String, Option<&'static str>);

fn settings(config: &EngineConfig) -> Settings {
    Settings {
        mode: config.pool,
        reserve: config.disk_reserve_mib << 20,
        contents: &[MACHINES, IMAGES, SNAPSHOTS, TEMPLATES, UPLOADS],
    }
}

/// Mounts or makes the pool of the data directory, where it has or needs one.
pub(crate) async fn open(config: &EngineConfig) -> Result<Option<Pool>, Error> {
    let (settings, data_dir) = (settings(config), config.data_dir.clone());
    let opened = blocking("open the pool", move || {
        Ok(pool::open(&data_dir, &settings)?)
    });
    match opened.await? {
        Storage::Native => Ok(None),
        Storage::Pool(pool) => {
            info!(dir = %pool.dir().display(), bytes = pool.size()?, "disks are in a pool");
            Ok(Some(pool))
        }
        Storage::Copies(obstacle) => {
            info!(
                reason = obstacle.reason,
                hint = obstacle.hint,
                "disks are copied, as there is no pool"
            );
            Ok(None)
        }
    }
}

impl Shared {
    /// Runs `work`; when that fills the pool, and the pool can grow, once more.
    pub(crate) fn with_room<T>(&self, work: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        let mut work = work;
        match &self.pool {
            Some(pool) => pool.with_room(0, Error::is_full, work),
            None => work(),
        }
    }
}

impl Engine {
    /// Lets the pool grow ahead of what is written into it, so that guests never wait for it.
    pub(crate) async fn keep_pool(self) {
        if self.shared.pool.is_none() {
            return;
        }
        let mut is_well = true;
        loop {
            let shared = self.shared.clone();
            let grown = blocking("let the pool grow", move || match &shared.pool {
                Some(pool) => Ok(pool.grow(0)?),
                None => Ok(0),
            });
            match grown.await {
                Ok(0) => is_well = true,
                Ok(bytes) => {
                    is_well = true;
                    info!(bytes, "the pool has grown");
                }
                Err(error) if is_well => {
                    is_well = false;
                    warn!(error = %error.chain(), "the pool cannot grow");
                }
                Err(_) => {}
            }
            tokio::time::sleep(deadline::POOL_GROWTH).await;
        }
    }

    /// Unmounts the pool unless a VMM works in it, and erases it when nothing is in it.
    pub(crate) async fn release_pool(&self) {
        let shared = self.shared.clone();
        let released = blocking("release the pool", move || match &shared.pool {
            Some(pool) => Ok(pool.release()?),
            None => Ok(true),
        });
        match released.await {
            Ok(true) => {}
            Ok(false) => info!("the pool stays mounted: something works in it"),
            Err(error) => warn!(error = %error.chain(), "the pool cannot be unmounted"),
        }
    }
}

/// What doctor says about it.
pub(crate) fn finding(config: &EngineConfig) -> Found {
    let data_dir = &config.data_dir;
    let place = data_dir.display();
    // The directory may not exist before the first start: its nearest parent has the same file system.
    let Some(dir) = data_dir.ancestors().find(|dir| dir.is_dir()) else {
        return (Level::Missing, format!("{place} cannot be made"), None);
    };
    let free = gib(dir);
    if pool::exists(data_dir) {
        let inside = match pool::is_mounted(data_dir) {
            true => format!("{} GiB free in it", gib(&pool::place(data_dir))),
            false => "not mounted while nothing runs".to_owned(),
        };
        let found = format!(
            "{place}: reflinks work in a pool of btrfs, {inside}; it can grow, {free} GiB free"
        );
        return (Level::Good, found, None);
    }
    if hutch_disk::reflink_supported(dir) {
        let found = format!("{place}: reflinks work, {free} GiB free");
        return (Level::Good, found, None);
    }
    match pool::obstacle(data_dir, &settings(config)) {
        None => {
            let found = format!("{place}: the server makes a pool of btrfs, {free} GiB free");
            (Level::Good, found, None)
        }
        Some(obstacle) => {
            let reason = obstacle.reason;
            let found = format!(
                "{place}: no reflinks and no pool, as {reason}: disks are copied; {free} GiB free"
            );
            (Level::Limited, found, Some(obstacle.hint))
        }
    }
}

fn gib(dir: &Path) -> u64 {
    hutch_disk::free_bytes(dir).map_or(0, |bytes| bytes >> 30)
}
