//! Following the change log. Owns where a follower stands and the order of looking and sleeping.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{Change, Error, Revision, Store};

/// Changes asked for at once.
const PAGE: usize = 256;

/// Every change of the keys under a prefix, once and in order, from some revision on.
pub struct Feed {
    store: Arc<dyn Store>,
    news: watch::Receiver<Revision>,
    prefix: String,
    after: Revision,
}

impl Feed {
    /// Follows `prefix` behind revision `after`.
    pub fn new(store: Arc<dyn Store>, prefix: impl Into<String>, after: Revision) -> Self {
        Self {
            news: store.subscribe(),
            store,
            prefix: prefix.into(),
            after,
        }
    }

    /// All up to this revision has been returned. It moves on over other keys' changes too, so
    /// that a follower of quiet keys is not overtaken by compaction.
    pub fn position(&self) -> Revision {
        self.after
    }

    /// The next changes, at least one, ending with a whole commit. Sleeps until there are some.
    /// Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// Those of [`Store::changes`], and [`Error::Stopped`] when there can be no more.
    pub async fn next(&mut self) -> Result<Vec<Change>, Error> {
        loop {
            // Taken before the read: a short page then holds everything up to here.
            let newest = *self.news.borrow_and_update();
            let page = self.store.changes(self.after, &self.prefix, PAGE).await?;
            if page.len() < PAGE {
                self.after = self.after.max(newest);
            }
            if let Some(last) = page.last() {
                self.after = self.after.max(last.revision);
                return Ok(page);
            }
            if self.news.changed().await.is_err() {
                return Err(Error::Stopped { cause: None });
            }
        }
    }
}
