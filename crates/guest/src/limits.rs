//! The numbers that host and agent share, and nothing else. A change here must still work against released agents.

/// The newest protocol generation that this code knows. Generation 0 does not exist.
pub const GENERATION: u32 = 3;
/// The generation that brought `Dial`.
pub const GENERATION_DIAL: u32 = 2;
/// The generation that brought `Move`, `Change`, `Walk` and writing at a file's end.
pub const GENERATION_FILES: u32 = 3;

/// HTTP/2 window of one stream, in bytes.
///
/// Far smaller than the connection's, so that one stream whose reader never drains leaves the others alone: the
/// protocol's defaults make both equal, and then one stalled stream stalls the machine.
pub const STREAM_WINDOW: u32 = 64 * 1024;
/// HTTP/2 window of the connection, in bytes: room for all streams to stall at once.
pub const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
/// Calls in flight on one connection; further ones wait on the host.
pub const STREAMS: u32 = 128;
/// Of these, connections into the machine: what forwards ports must leave room for commands and files.
pub const DIALS: u32 = 64;
/// Largest HTTP/2 frame payload, in bytes.
pub const HTTP2_FRAME: u32 = 16 * 1024;
/// Bytes of one stream that may wait unsent in the sender.
pub const SEND_BUFFER: usize = 128 * 1024;
/// Largest block of headers or trailers, in bytes. An error's text travels there.
pub const HEADERS: u32 = 16 * 1024;
/// Largest message either side accepts, in bytes.
pub const MESSAGE: usize = 1024 * 1024;
/// Largest message of a stream that the host accepts, in bytes: room for a [`CHUNK`] and more, and little enough that all
/// streams at once stay small in memory.
pub const STREAM_MESSAGE: usize = 128 * 1024;
/// Largest piece of output, input or file content that a sender puts in one message, in bytes.
pub const CHUNK: usize = 32 * 1024;
/// Most entries in one page of a directory.
pub const LIST_ENTRIES: u32 = 1000;
/// Calls cancelled before the other side saw them, after which a connection is closed as abused. The host cancels
/// at will (a client went away), so this is far above the library's default of 20.
pub const PENDING_RESETS: usize = 4096;

// Every stream may fill its window without using up the connection's.
const _: () = assert!(STREAMS * STREAM_WINDOW <= CONNECTION_WINDOW);
const _: () = assert!(DIALS < STREAMS);
