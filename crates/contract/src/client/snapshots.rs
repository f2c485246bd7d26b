//! The routes of snapshots.

use std::time::Duration;

use reqwest::Method;

use super::routes::{NO_WAIT, optional, waiting};
use super::{Client, Error};
use crate::image::Accepted;
use crate::machine::Machine;
use crate::page::{MAX_LIMIT, Page};
use crate::snapshot::{
    CreateSnapshot, ForkMachine, Forked, RestoreMachine, Snapshot, SnapshotImage,
};

/// How long a fork may take beside what it waits for: it takes a snapshot first.
const FORK_TIME: Duration = Duration::from_secs(600);

/// Snapshots.
impl Client {
    /// `POST /v1/machines/{id}/snapshots`. With `wait` it answers when the snapshot is ready, or with why it is not.
    pub async fn take_snapshot(
        &self,
        reference: &str,
        snapshot: &CreateSnapshot,
        wait: Option<Duration>,
    ) -> Result<Snapshot, Error> {
        let request = self.of(Method::POST, reference, &["snapshots"])?;
        let request = waiting(request.json(snapshot), "true", wait);
        self.json(request, wait.unwrap_or(NO_WAIT)).await
    }

    /// All pages of `GET /v1/machines/{id}/snapshots`, or of `GET /v1/snapshots`.
    pub async fn all_snapshots(&self, machine: Option<&str>) -> Result<Vec<Snapshot>, Error> {
        let mut all = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let request = match machine {
                Some(machine) => self.of(Method::GET, machine, &["snapshots"])?,
                None => self.request(Method::GET, &["v1", "snapshots"])?,
            };
            let request = optional(request, "limit", Some(MAX_LIMIT));
            let request = optional(request, "cursor", cursor.as_deref());
            let page: Page<Snapshot> = self.json(request, NO_WAIT).await?;
            all.extend(page.items);
            cursor = page.next;
            if cursor.is_none() {
                return Ok(all);
            }
        }
    }

    /// `GET /v1/snapshots/{id}`; an id or `MACHINE:NAME`.
    pub async fn snapshot(&self, reference: &str) -> Result<Snapshot, Error> {
        let request = self.request(Method::GET, &["v1", "snapshots", reference])?;
        self.json(request, NO_WAIT).await
    }

    /// `POST /v1/snapshots/{id}/image`: makes an image of its disk.
    pub async fn snapshot_image(
        &self,
        reference: &str,
        image: &SnapshotImage,
    ) -> Result<Accepted, Error> {
        let request = self.request(Method::POST, &["v1", "snapshots", reference, "image"])?;
        self.json(request.json(image), NO_WAIT).await
    }

    /// `DELETE /v1/snapshots/{id}`.
    pub async fn delete_snapshot(&self, reference: &str) -> Result<(), Error> {
        self.nothing(self.request(Method::DELETE, &["v1", "snapshots", reference])?)
            .await
    }

    /// `POST /v1/machines/{id}/restore`. With `wait` it answers when the machine is at its level again.
    pub async fn restore(
        &self,
        reference: &str,
        restore: &RestoreMachine,
        wait: Option<Duration>,
    ) -> Result<Machine, Error> {
        let request = self.of(Method::POST, reference, &["restore"])?;
        let request = waiting(request.json(restore), "true", wait);
        self.json(request, wait.unwrap_or(NO_WAIT)).await
    }

    /// `POST /v1/machines/{id}/fork`. With `wait` it answers when each copy runs, or does not. With the same
    /// `idempotency_key` no copy is made twice.
    pub async fn fork(
        &self,
        reference: &str,
        fork: &ForkMachine,
        wait: Option<Duration>,
        idempotency_key: Option<&str>,
    ) -> Result<Forked, Error> {
        let request = self.of(Method::POST, reference, &["fork"])?;
        let mut request = waiting(request.json(fork), "true", wait);
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        self.json(request, wait.unwrap_or(NO_WAIT) + FORK_TIME)
            .await
    }
}
