//! What comes out of a machine, passed through as it is: a command's two streams, bytes of a file or a log.

use std::process::ExitCode;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use hutch_contract::client::{self, ByteStream};
use hutch_contract::exec::{ExecEvent, ExecExit};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::error::{Error, OURS};
use crate::ui::Ui;

/// Passes a command's output to our own stdout and stderr until it ends.
pub async fn of_command(
    mut events: BoxStream<'static, Result<ExecEvent, client::Error>>,
    ui: Ui,
) -> Result<ExecExit, Error> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    while let Some(event) = events.try_next().await? {
        match event {
            ExecEvent::Started { .. } => {}
            ExecEvent::Stdout { data_base64, .. } => {
                pass(&mut stdout, &decode(&data_base64)?).await?
            }
            ExecEvent::Stderr { data_base64, .. } => {
                pass(&mut stderr, &decode(&data_base64)?).await?
            }
            ExecEvent::Dropped { bytes } => {
                ui.say(format!("hutch: {bytes} bytes of output were lost"))
            }
            ExecEvent::Exit(exit) => {
                if exit.timed_out {
                    ui.say("hutch: the command ran longer than --timeout and was ended");
                }
                return Ok(exit);
            }
            ExecEvent::Error { message, hint, .. } => return Err(Error::Exec { message, hint }),
        }
    }
    // The client ends every stream with one of the two events above or with an error of its own.
    Err(Error::Exec {
        message: "the output ended before the command did".to_owned(),
        hint: None,
    })
}

/// What we exit with after a command: its own code.
pub fn exit_code(exit: &ExecExit) -> ExitCode {
    ExitCode::from(u8::try_from(exit.exit_code).unwrap_or(OURS))
}

/// Passes bytes to our own stdout.
pub async fn of_bytes(mut bytes: ByteStream) -> Result<(), Error> {
    let mut stdout = tokio::io::stdout();
    while let Some(chunk) = bytes.try_next().await? {
        pass(&mut stdout, &chunk).await?;
    }
    Ok(())
}

/// Writes at once: whoever reads wants to see it as it happens.
async fn pass(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), Error> {
    to.write_all(bytes).await.map_err(Error::stdout)?;
    to.flush().await.map_err(Error::stdout)
}

fn decode(text: &str) -> Result<Vec<u8>, Error> {
    let broken = |_| Error::Exec {
        message: "the server sent output that is not base64".to_owned(),
        hint: None,
    };
    BASE64_STANDARD.decode(text).map_err(broken)
}
