//! How long each thing that could hang may take: one table.

use std::time::Duration;

/// Starting a VMM, until its shim has reported.
pub const LAUNCH: Duration = Duration::from_secs(15);
/// Making what a machine has outside of its directory: at the first time an image is copied there.
pub const OUTSIDE_MADE: Duration = Duration::from_secs(900);
/// Listing, or removing one of, what runtimes have of ours outside of every directory.
pub const OUTSIDE: Duration = Duration::from_secs(30);
/// Finding out what became of a machine while no server was there.
pub const ADOPT: Duration = Duration::from_secs(10);
/// From a stream that broke off until its session is known to have ended.
pub const CLOSED: Duration = Duration::from_secs(1);
/// Opening a connection to an agent that answered before.
pub const RECONNECT: Duration = Duration::from_secs(20);
/// From a warm start until the agent answers; a machine that takes longer boots instead.
pub const WARM: Duration = Duration::from_secs(30);
/// Pausing a VMM, or letting it go on.
pub const PAUSE: Duration = Duration::from_secs(10);
/// From the answer of a guest that it is frozen until it is paused: it thaws by itself after ten seconds.
pub const FROZEN: Duration = Duration::from_secs(8);
/// A fork that waits for the snapshot it makes its copies of: for a machine that is starting, and for a large disk.
pub const FORKED: Duration = Duration::from_secs(600);
/// Saving a machine's memory.
pub const MEMORY: Duration = Duration::from_secs(300);
/// From the wish to stop until the guest's processes are killed, in the guest.
pub const STOP_GRACE: Duration = Duration::from_secs(5);
/// From the wish to stop until the VMM is killed.
pub const STOP: Duration = Duration::from_secs(20);
/// From the kill until the VMM is gone.
pub const KILL: Duration = Duration::from_secs(10);
/// Connecting to a machine's own address, before its agent is asked to.
pub const DIAL_STRAIGHT: Duration = Duration::from_secs(1);
/// A call or a connection that waits for a starting machine, when the caller names no time.
pub const READY: Duration = Duration::from_secs(120);
/// Between two attempts at something that keeps failing: doubles from the first to the second.
pub const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// A slot's rest before another machine may have it: late packets and connections die meanwhile.
pub const SLOT_REST: Duration = Duration::from_secs(30);
/// How long a reply is kept for a repeated request with the same idempotency key.
pub const IDEMPOTENCY: Duration = Duration::from_secs(24 * 3600);
/// Between two rounds of dropping what is too old.
pub const HOUSEKEEPING: Duration = Duration::from_secs(3600);
/// Between two looks at what is free in the pool. It keeps 512 MiB to 4 GiB ahead: guests that together write more in that
/// time see a full disk before it grows.
pub const POOL_GROWTH: Duration = Duration::from_secs(1);
/// Between two attempts at the lock of a data directory.
pub const LOCK_AGAIN: Duration = Duration::from_millis(20);
/// A port of the host that a request names: until whoever has it, such as a machine that is just gone, has let it go.
pub const PORT_LET_GO: Duration = Duration::from_secs(1);
