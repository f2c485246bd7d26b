//! `hutch doctor`.

use std::path::PathBuf;
use std::process::ExitCode;

use hutch_contract::node::{Finding, Level};
use hutch_server::Flags;

use super::{App, serve};
use crate::error::Error;
use crate::ui::printable;

/// Say what this host can do, and how it could do more
///
/// Needs no running server. The exit code is 1 when something is missing without which no machine can be made.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  hutch doctor
  hutch doctor --json | jq -r 'select(.level != \"good\").hint'")]
pub struct Args {
    /// Configuration file of the server, TOML or YAML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub async fn run(args: Args, app: &App) -> Result<ExitCode, Error> {
    let flags = Flags {
        config: args.config,
        data_dir: app.place.data_dir.clone(),
        ..Flags::default()
    };
    let findings = hutch_server::doctor(&serve::load(app, flags)?.config).await;
    for finding in &findings {
        if app.ui.json {
            app.ui.object(finding)?;
        } else {
            app.ui.line(paragraph(finding))?;
        }
    }
    let missing = findings
        .iter()
        .any(|finding| finding.level == Level::Missing);
    Ok(ExitCode::from(u8::from(missing)))
}

/// A finding for people; what to do about it stands below.
fn paragraph(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Good => "good",
        Level::Limited => "limited",
        Level::Missing => "MISSING",
    };
    let mut text = format!(
        "{level:<7}  {:<12}  {}",
        printable(&finding.area),
        printable(&finding.found)
    );
    if let Some(hint) = &finding.hint {
        text += &format!("\n{:23}hint: {}", "", printable(hint));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_stands_below_what_it_is_about() {
        let finding = Finding {
            area: "disk".to_owned(),
            level: Level::Limited,
            found: "copies are not shared".to_owned(),
            hint: Some("use btrfs".to_owned()),
        };
        let expected =
            "limited  disk          copies are not shared\n                       hint: use btrfs";
        assert_eq!(paragraph(&finding), expected);
    }
}
