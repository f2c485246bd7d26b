//! Requests that the typed client cannot even say: HTTP/1.1 by hand over the server's socket.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Its JSON; null when it has none.
    pub body: Value,
}

impl Answer {
    /// The error's code.
    pub fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }

    /// Holds it against what an error must be: this status and code, a sentence, a request id.
    #[track_caller]
    pub fn must_be(&self, status: u16, code: &str) -> &Self {
        assert_eq!((self.status, self.code()), (status, code), "{self:?}");
        for field in ["message", "request_id"] {
            assert!(
                self.body[field]
                    .as_str()
                    .is_some_and(|text| !text.is_empty()),
                "{self:?}"
            );
        }
        self
    }

    /// And that it says what to do next.
    #[track_caller]
    pub fn with_hint(&self) -> &Self {
        assert!(
            self.body["hint"]
                .as_str()
                .is_some_and(|hint| !hint.is_empty()),
            "{self:?}"
        );
        self
    }
}

/// Sends one request on a connection of its own.
pub(crate) async fn request(socket: &Path, method: &str, path: &str, body: &str) -> Answer {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(120), exchange)
        .await
        .unwrap()
        .unwrap();
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no HTTP: {answer}"));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    // An answer in chunks has lengths around its JSON.
    let json = body
        .find('{')
        .zip(body.rfind('}'))
        .map_or("null", |(from, to)| &body[from..=to]);
    Answer {
        status: status.unwrap_or_else(|| panic!("no HTTP: {answer}")),
        body: serde_json::from_str(json).unwrap_or(Value::Null),
    }
}
