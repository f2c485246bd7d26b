//! How long the host waits for each call's answer. Calls that may rightly take any time get theirs from the caller.

use std::time::Duration;

/// Identity: growing a large file system is part of it.
pub const CONFIGURE: Duration = Duration::from_secs(60);
/// Freezing processes and file systems.
pub const QUIESCE: Duration = Duration::from_secs(20);
/// Undoing that.
pub const THAW: Duration = Duration::from_secs(10);
/// The promise to power off, not the power-off.
pub const SHUTDOWN: Duration = Duration::from_secs(10);
/// Starting a process, on a machine that may have to read its program from disk.
pub const START: Duration = Duration::from_secs(30);
/// Until output or file content begins to flow.
pub const STREAM: Duration = Duration::from_secs(30);
/// Signals, sizes, the process table and its rows.
pub const PROCESS: Duration = Duration::from_secs(15);
/// One look at a path.
pub const STAT: Duration = Duration::from_secs(15);
/// One page of a directory.
pub const LIST_DIR: Duration = Duration::from_secs(30);
/// A whole tree may have to go.
pub const REMOVE: Duration = Duration::from_secs(120);
/// A rename.
pub const MOVE: Duration = Duration::from_secs(15);
/// A whole tree may have to be changed.
pub const CHANGE: Duration = Duration::from_secs(120);
/// One page of a walk, which looks at a bounded number of names.
pub const WALK: Duration = Duration::from_secs(60);
/// Making directories.
pub const MAKE_DIR: Duration = Duration::from_secs(15);
/// A guest that takes no more of a file being written, or does not confirm it once it has all.
pub const WRITE_STALL: Duration = Duration::from_secs(60);
/// Until a connection inside the machine stands, the wait for one of its places included; the agent gives up before.
pub const DIAL: Duration = Duration::from_secs(15);
