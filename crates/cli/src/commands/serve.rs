use super::*;
use std::ffi::OsStr;
/// Run the server
#[derive(Debug, clap::Args)]
pub struct Args {}
pub async fn run(_: Args, _: &App, _: Signals) -> Result<ExitCode, Error> {
    Ok(ExitCode::SUCCESS)
}
pub fn hidden(_: Option<&OsStr>) -> Option<ExitCode> {
    None
}
pub struct Embedded;
impl Embedded {
    pub async fn start(_: &App) -> Result<Embedded, Error> {
        Ok(Embedded)
    }
    pub fn client(&self) -> Result<Client, Error> {
        Err(Error::NoDataDir)
    }
    pub async fn stop(self) {}
}
