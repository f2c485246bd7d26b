use super::*;
/// Say what this host can do
#[derive(Debug, clap::Args)]
pub struct Args {}
pub async fn run(_: Args, _: &App) -> Result<ExitCode, Error> {
    Ok(ExitCode::SUCCESS)
}
