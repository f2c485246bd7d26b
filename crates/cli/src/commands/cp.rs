//! `hutch cp`.

use std::path::Path;
use std::process::ExitCode;

use hutch_contract::client::{Client, Upload};
use hutch_contract::error::Kind;
use hutch_contract::file::FileKind;

use super::App;
use crate::error::Error;
use crate::ui::Ui;
use crate::{output, transfer};

/// Copy a file into or out of a machine
///
/// One side is MACHINE:/path, the other a file on this side or `-` for standard input or output. Permission bits are
/// kept. A file that comes out replaces an old one only when it is whole.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch cp setup.sh web:/root/
  hutch cp web:/var/log/syslog .
  tar c . | hutch cp - web:/tmp/all.tar")]
pub struct Args {
    /// File to copy: a path here, MACHINE:/path, or -
    source: String,
    /// Where to: a path here, MACHINE:/path, or -
    target: String,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    match (Side::of(&args.source)?, Side::of(&args.target)?) {
        (Side::Here(from), Side::Machine(machine, to)) => {
            upload(&app.client()?, from, machine, to, app.ui).await?
        }
        (Side::Machine(machine, from), Side::Here(to)) => {
            download(&app.client()?, machine, from, to, app.ui).await?
        }
        _ => return Err(Error::CopySides),
    }
    Ok(ExitCode::SUCCESS)
}

/// One side of a copy.
#[derive(Debug, PartialEq)]
enum Side<'a> {
    Here(&'a Path),
    Machine(&'a str, &'a str),
}

impl Side<'_> {
    /// A colon makes it a machine's, unless a slash comes before it.
    fn of(text: &str) -> Result<Side<'_>, Error> {
        match text.split_once(':') {
            Some((machine, path)) if !machine.is_empty() && !machine.contains('/') => {
                if !path.starts_with('/') {
                    return Err(Error::RelativePath {
                        path: path.to_owned(),
                    });
                }
                Ok(Side::Machine(machine, path))
            }
            _ => Ok(Side::Here(Path::new(text))),
        }
    }
}

async fn upload(
    client: &Client,
    from: &Path,
    machine: &str,
    to: &str,
    ui: Ui,
) -> Result<(), Error> {
    let source = transfer::open(from, ui).await?;
    let into_directory = match client.stat_file(machine, to).await {
        Ok(found) => found.kind == FileKind::Directory || to.ends_with('/'),
        Err(error)
            if error.kind() == Kind::NotFound && error.code() != Some("machine_not_found") =>
        {
            if to.ends_with('/') {
                return Err(Error::NotDirectory {
                    path: to.to_owned(),
                });
            }
            false
        }
        Err(error) => return Err(error.into()),
    };
    let mut path = to.to_owned();
    if into_directory {
        let name = from
            .file_name()
            .and_then(|name| name.to_str())
            .filter(|name| *name != "-");
        let name = name.ok_or_else(|| Error::NoFileName {
            path: to.to_owned(),
        })?;
        path = format!("{}/{name}", to.trim_end_matches('/'));
    }
    let upload = Upload {
        path,
        mode: source.mode,
        size_bytes: source.size_bytes,
        ..Upload::default()
    };
    let written = client.write_file(machine, &upload, source.body).await;
    source.bar.finish_and_clear();
    written?;
    Ok(())
}

async fn download(
    client: &Client,
    machine: &str,
    from: &str,
    to: &Path,
    ui: Ui,
) -> Result<(), Error> {
    if to == Path::new("-") {
        return output::of_bytes(client.read_file(machine, from, 0, None).await?.bytes).await;
    }
    // The name is the one that was asked for; the guest has no say in where a file goes on this side.
    let name = from
        .rsplit('/')
        .next()
        .filter(|name| !matches!(*name, "" | "." | ".."));
    let path = transfer::destination(to, name)?;
    if client.stat_file(machine, from).await?.kind == FileKind::Directory {
        return Err(Error::IsDirectory {
            path: from.to_owned(),
        });
    }
    transfer::save(client.read_file(machine, from, 0, None).await?, &path, ui).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_makes_a_machine_unless_a_slash_comes_first() {
        assert_eq!(
            Side::of("web:/etc/x:y").unwrap(),
            Side::Machine("web", "/etc/x:y")
        );
        for here in ["./a:/b", "/a:/b", ":/b", "a", "-"] {
            assert_eq!(Side::of(here).unwrap(), Side::Here(Path::new(here)));
        }
        assert!(matches!(Side::of("web:x"), Err(Error::RelativePath { .. })));
    }
}
