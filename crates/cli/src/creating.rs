//! Creating a machine, and first its image when we know how to make that.

use hutch_contract::client::{self, Client};
use hutch_contract::image::{BootstrapImage, Image};
use hutch_contract::machine::{CreateMachine, Machine};

use crate::error::Error;
use crate::ui::{Ui, table_text};
use crate::waiting;

/// Images that a server can make from what its host has, and of which distribution.
const KNOWN: [(&str, &str); 2] = [("debian-base", "debian"), ("busybox", "busybox")];

/// Asks for a machine; it is starting then. `key` makes sure that asking again makes no second one.
pub async fn create(
    client: &Client,
    request: &CreateMachine,
    key: &str,
    ui: Ui,
) -> Result<Machine, Error> {
    match post(client, request, key).await {
        Err(error) if error.code() == Some("image_not_found") => {
            let known = KNOWN.into_iter().find(|(image, _)| *image == request.image);
            let (image, distribution) = known.ok_or(error)?;
            ui.say(format!(
                "The image {image} is not there yet. Making it now, this once:"
            ));
            let name = image.parse().ok();
            self::image(
                client,
                &BootstrapImage {
                    distribution: distribution.to_owned(),
                    suite: None,
                    name,
                },
                ui,
            )
            .await?;
            Ok(post(client, request, key).await?)
        }
        result => Ok(result?),
    }
}

/// Makes an image from what the server's host has, and shows how far it is.
pub async fn image(client: &Client, wanted: &BootstrapImage, ui: Ui) -> Result<Image, Error> {
    let accepted = client.bootstrap_image(wanted).await?;
    let made = waiting::operation(client, &accepted.operation, ui).await?;
    Ok(client.image(&made).await?)
}

async fn post(
    client: &Client,
    request: &CreateMachine,
    key: &str,
) -> Result<Machine, client::Error> {
    unless_unknown(async || client.create(request, Some(key), None).await).await
}

/// Asks once more when it is not known what became of the first request, which has an idempotency key.
pub async fn unless_unknown<T>(
    ask: impl AsyncFn() -> Result<T, client::Error>,
) -> Result<T, client::Error> {
    match ask().await {
        Err(client::Error::Protocol { .. } | client::Error::Timeout { .. }) => ask().await,
        result => result,
    }
}

/// A key that no other request has.
pub fn idempotency_key() -> String {
    hutch_contract::id::OperationId::new().to_string()
}

/// Shows how long each step of a machine's start took.
pub fn show_timings(machine: &Machine, ui: Ui) {
    let ms = |us: u64| format!("{}.{} ms", us / 1000, us % 1000 / 100);
    let rows = machine
        .timings
        .iter()
        .map(|step| [step.phase.clone(), ms(step.start_us), ms(step.took_us)]);
    ui.say(table_text(["PHASE", "AFTER", "TOOK"], rows));
}
