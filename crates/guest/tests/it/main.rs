//! The link and the session as their users see them, against doubles in memory. Time stands still but for timers, so
//! nothing here waits for real.

#![expect(clippy::unwrap_used, reason = "these are tests")]

mod dial;
mod hostile;
mod link;
mod port;
mod schema;
mod session;

use std::time::Duration;

/// Longer than anything honest takes.
const SOON: Duration = Duration::from_secs(20);
