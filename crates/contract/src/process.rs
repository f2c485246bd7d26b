//! Processes in machines: started, listed, attached to, ended; and the words of the WebSocket that attaches to one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::exec::ExecExit;
use crate::id::ProcessId;

/// The most bytes of standard input or output that one frame carries.
pub const MAX_FRAME_DATA_BYTES: usize = 64 * 1024;
/// The largest frame of either side: the data and what stands before it.
pub const MAX_FRAME_BYTES: usize = MAX_FRAME_DATA_BYTES + OUTPUT_HEAD_BYTES;
/// What stands before output: the channel and the sequence.
const OUTPUT_HEAD_BYTES: usize = 9;
/// What stands before standard input.
const STDIN_CHANNEL: u8 = 0;
/// The most rows and columns of a terminal.
const MAX_TERMINAL: u16 = 4096;

/// A process to start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct StartProcess {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Added to the machine's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; the image's when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User, or `user:group`; the image's when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Keep its standard input open, to be written to later; a terminal's always is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stdin: bool,
    /// Give it a terminal of this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pty: Option<PtySize>,
    /// Ends it and all it started after so many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// A process that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct StartedProcess {
    /// Its name from now on.
    pub id: ProcessId,
    /// Its number in the machine.
    pub pid: u32,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PtySize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

impl PtySize {
    /// Whether a terminal can have this size.
    #[must_use]
    pub fn is_possible(self) -> bool {
        let possible = |size| (1..=MAX_TERMINAL).contains(&size);
        possible(self.rows) && possible(self.cols)
    }
}

/// A process in a machine, as the guest tells it. It is listed until it is deleted, or until it has ended and the machine
/// needs its place for others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Process {
    /// As given at its start.
    pub id: ProcessId,
    /// Its number in the machine.
    pub pid: u32,
    /// The program and its arguments, shortened when they are long; the guest's text.
    pub command: Vec<String>,
    /// When it was started by the machine's clock, UTC, in milliseconds since 1970.
    pub started_at_ms: i64,
    /// Whether it has a terminal.
    pub pty: bool,
    /// How it ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExecExit>,
}

/// All processes of a machine that were started through the API, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Processes {
    /// One each.
    pub items: Vec<Process>,
}

/// A signal to send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SendSignal {
    /// Which.
    pub signal: Signal,
    /// To everything that the process started, and not to its process group alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
}

/// A signal by its number, 1 to 64, or its name with or without `SIG`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum Signal {
    /// Such as 15.
    Number(u8),
    /// Such as `TERM`.
    Name(String),
}

/// Linux' signals from 1 on, by which every machine goes.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

impl Signal {
    /// Its number; none when there is no such signal.
    #[must_use]
    pub fn number(&self) -> Option<i32> {
        let number = match self {
            Signal::Number(number) => *number,
            Signal::Name(name) => {
                let name = name.to_ascii_uppercase();
                let name = name.strip_prefix("SIG").unwrap_or(&name);
                let at = SIGNALS.iter().position(|known| *known == name)?;
                u8::try_from(at + 1).ok()?
            }
        };
        (1..=64).contains(&number).then(|| number.into())
    }
}

/// How much standard input a process has taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct InputTaken {
    /// Fewer bytes than were sent when it closed its end.
    pub accepted_bytes: u64,
}

/// What the client of a WebSocket says in a text frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientMessage {
    /// The terminal has this size now.
    Resize(PtySize),
    /// Send a signal to the process group.
    Signal(Signal),
    /// With `true`: standard input ends after what was sent.
    Eof(bool),
}

/// What the server of a WebSocket says in a text frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerMessage {
    /// It has ended; nothing follows.
    Exit(ExecExit),
    /// So many bytes of output are gone.
    Dropped(u64),
    /// Something that the client asked for was not done; all else goes on.
    Refused(AttachError),
    /// We cannot go on; nothing follows. The process does.
    Error(AttachError),
}

/// Why an attachment ends, or why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachError {
    /// A stable word.
    pub code: String,
    /// One sentence.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Where output was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputChannel {
    /// Standard output; all output of a process with a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Output as a binary frame of a WebSocket: channel (1 stdout, 2 stderr), sequence of its first byte (8 bytes, the
/// highest first), bytes.
#[must_use]
pub fn output_frame(channel: OutputChannel, sequence: u64, data: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(OUTPUT_HEAD_BYTES + data.len());
    frame.push(match channel {
        OutputChannel::Stdout => 1,
        OutputChannel::Stderr => 2,
    });
    frame.extend_from_slice(&sequence.to_be_bytes());
    frame.extend_from_slice(data);
    frame
}

/// What a frame of [`output_frame`] says; none when it is no such frame.
#[must_use]
pub fn read_output_frame(frame: &[u8]) -> Option<(OutputChannel, u64, &[u8])> {
    let (head, data) = frame.split_first_chunk::<OUTPUT_HEAD_BYTES>()?;
    let (channel, sequence) = head.split_first()?;
    let channel = match channel {
        1 => OutputChannel::Stdout,
        2 => OutputChannel::Stderr,
        _ => return None,
    };
    Some((channel, u64::from_be_bytes(sequence.try_into().ok()?), data))
}

/// Standard input as a binary frame of a WebSocket: channel 0, bytes.
#[must_use]
pub fn stdin_frame(data: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(1 + data.len());
    frame.push(STDIN_CHANNEL);
    frame.extend_from_slice(data);
    frame
}

/// The bytes of a frame of [`stdin_frame`]; none when it is no such frame.
#[must_use]
pub fn read_stdin_frame(frame: &[u8]) -> Option<&[u8]> {
    frame.strip_prefix(&[STDIN_CHANNEL])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_known_by_number_and_by_name() {
        let signal = |text: &str| serde_json::from_str::<Signal>(text).unwrap().number();
        assert_eq!(signal("15"), Some(15));
        assert_eq!(signal("64"), Some(64));
        assert_eq!(signal(r#""TERM""#), Some(15));
        assert_eq!(signal(r#""sigkill""#), Some(9));
        assert_eq!(signal(r#""SYS""#), Some(31));
        for none in ["0", "65", r#""""#, r#""SIG""#, r#""15""#, r#""PARTY""#] {
            assert_eq!(signal(none), None, "{none}");
        }
        assert!(serde_json::from_str::<Signal>("-1").is_err());
        assert!(serde_json::from_str::<Signal>("300").is_err());
    }

    #[test]
    fn frames_read_back_as_they_were_written() {
        let frame = output_frame(OutputChannel::Stderr, 0x0102_0304_0506_0708, b"hi");
        assert_eq!(frame, [2, 1, 2, 3, 4, 5, 6, 7, 8, b'h', b'i']);
        let read = read_output_frame(&frame).unwrap();
        assert_eq!(
            read,
            (OutputChannel::Stderr, 0x0102_0304_0506_0708, &b"hi"[..])
        );
        assert_eq!(read_stdin_frame(&stdin_frame(b"in")), Some(&b"in"[..]));
        assert_eq!(read_stdin_frame(&frame), None);
        for no_output in [&b""[..], &[1, 2, 3], &[0; 12], &[3; 12]] {
            assert_eq!(read_output_frame(no_output), None);
        }
    }

    #[test]
    fn the_words_of_a_websocket_are_as_documented() {
        let json = |message: &ServerMessage| serde_json::to_string(message).unwrap();
        assert_eq!(json(&ServerMessage::Dropped(3)), r#"{"dropped":3}"#);
        let exit = ExecExit {
            exit_code: 0,
            signal: None,
            timed_out: false,
        };
        assert_eq!(
            json(&ServerMessage::Exit(exit)),
            r#"{"exit":{"exit_code":0}}"#
        );
        let said = |text: &str| serde_json::from_str::<ClientMessage>(text).unwrap();
        let size = PtySize { rows: 24, cols: 80 };
        assert_eq!(
            said(r#"{"resize":{"rows":24,"cols":80}}"#),
            ClientMessage::Resize(size)
        );
        let int = Signal::Name("INT".to_owned());
        assert_eq!(said(r#"{"signal":"INT"}"#), ClientMessage::Signal(int));
        assert_eq!(said(r#"{"eof":true}"#), ClientMessage::Eof(true));
    }
}
