//! How we speak: data on stdout, talk on stderr, tables for people, one JSON object a line for programs.
//!
//! Nothing else writes to either stream. A closed stdout is an error like any other, never a panic; a closed stderr
//! only means that nobody listens.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::error::Error;

/// The two streams, and for whom we write.
#[derive(Debug, Clone, Copy)]
pub struct Ui {
    /// Whether a program reads: then stdout has JSON objects, one a line.
    pub json: bool,
}

impl Ui {
    /// Writes a line of data.
    pub fn line(self, text: impl Display) -> Result<(), Error> {
        writeln!(io::stdout().lock(), "{text}").map_err(Error::stdout)
    }

    /// Writes a value as one line of JSON.
    pub fn object(self, value: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_string(value).expect("our types have only string keys");
        self.line(text)
    }

    /// Writes a name as data: bare for people, in an object for programs.
    pub fn name(self, name: &str) -> Result<(), Error> {
        if self.json {
            self.object(&serde_json::json!({ "name": name }))
        } else {
            self.line(printable(name))
        }
    }

    /// Writes rows: as a table for people, as they are for programs.
    pub fn rows<T: Serialize, const N: usize>(
        self,
        heads: [&str; N],
        rows: &[T],
        cells: impl Fn(&T) -> [String; N],
    ) -> Result<(), Error> {
        if self.json {
            return rows.iter().try_for_each(|row| self.object(row));
        }
        let table = rows.iter().map(cells);
        self.line(table_text(heads, table))
    }

    /// Says something to a person.
    pub fn say(self, text: impl Display) {
        let _nobody_listens = writeln!(io::stderr().lock(), "{text}");
    }

    /// Whether a person watches stderr as it grows.
    pub fn watched(self) -> bool {
        io::stderr().is_terminal()
    }
}

/// Columns under their heads, with two spaces between and none at the end of a line; control characters escaped.
pub fn table_text<const N: usize>(
    heads: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let mut lines = vec![heads.map(str::to_owned)];
    lines.extend(rows.map(|row| row.map(|cell| printable(&cell))));
    let mut widths = [0; N];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let text = lines.iter().map(|line| {
        let padded = line
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    text.collect::<Vec<_>>().join("\n")
}

/// Text from elsewhere made harmless for a terminal: what would move the cursor, start an escape sequence or turn the
/// direction of writing is shown as an escape instead.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || turns {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// How long ago a moment was, by its largest unit.
pub fn age(since_ms: u64) -> String {
    span(now_ms().saturating_sub(since_ms) / 1000)
}

/// How far away a moment is, by its largest unit.
pub fn left(until_ms: u64) -> String {
    span(until_ms.saturating_sub(now_ms()) / 1000)
}

fn now_ms() -> u64 {
    let passed = SystemTime::now().duration_since(UNIX_EPOCH);
    passed.map_or(0, |passed| passed.as_millis() as u64)
}

/// Seconds by their largest unit.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// A size with a unit.
pub fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_cannot_steer_a_terminal() {
        let hostile = "a\x1b[2J\r\nb\u{9b}31m\u{7f}\u{202e}c é";
        assert_eq!(
            printable(hostile),
            r"a\u{1b}[2J\r\nb\u{9b}31m\u{7f}\u{202e}c é"
        );
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [
            ["long-name".to_owned(), "x".to_owned()],
            ["é".to_owned(), String::new()],
        ];
        let text = table_text(["NAME", "STATUS"], rows.into_iter());
        assert_eq!(text, "NAME       STATUS\nlong-name  x\né");
    }
}
