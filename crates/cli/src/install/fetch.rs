//! Downloads: bounded in size, hashed as they come in.

use std::io::Write;
use std::time::Duration;

use reqwest::{Client, Response, StatusCode, Url, redirect};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::{Error, release};
use crate::progress;
use crate::ui::Ui;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Between two pieces of a download.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Many times the largest release there was.
const MAX_BYTES: u64 = 256 << 20;
const MAX_SUMS_BYTES: usize = 64 << 10;

/// A client for `url`; a secure address leads to secure ones only.
pub(super) fn client(url: &Url) -> Result<Client, Error> {
    hutch_contract::client::ready_for_tls();
    let secure = url.scheme() == "https";
    let builder = Client::builder()
        .user_agent(concat!("hutch/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(redirect::Policy::limited(5))
        .https_only(secure);
    builder.build().map_err(failed(url))
}

fn failed(url: &Url) -> impl FnOnce(reqwest::Error) -> Error {
    let url = url.clone();
    move |source| Error::Download {
        url,
        source: source.without_url(),
    }
}

async fn get(http: &Client, url: &Url) -> Result<Response, Error> {
    let response = http.get(url.clone()).send().await.map_err(failed(url))?;
    match response.status() {
        StatusCode::OK => Ok(response),
        status => Err(Error::Status {
            url: url.clone(),
            status,
        }),
    }
}

/// The checksum that is published beside a file; none where there is no such file and another checksum is known.
pub(super) async fn published_sum(
    http: &Client,
    url: &Url,
    asset: &str,
    other_known: bool,
) -> Result<Option<String>, Error> {
    let mut response = match get(http, url).await {
        Err(Error::Status { status, .. }) if status == StatusCode::NOT_FOUND && other_known => {
            return Ok(None);
        }
        response => response?,
    };
    let mut text = Vec::new();
    while let Some(bytes) = response.chunk().await.map_err(failed(url))? {
        text.extend_from_slice(&bytes);
        if text.len() > MAX_SUMS_BYTES {
            return Err(Error::TooLarge {
                url: url.clone(),
                limit: MAX_SUMS_BYTES as u64,
            });
        }
    }
    let found = sum_of(&String::from_utf8_lossy(&text), asset);
    found.map(Some).ok_or_else(|| Error::NoSum {
        asset: asset.to_owned(),
    })
}

/// The sum of a file in the output of `sha256sum`.
fn sum_of(text: &str, asset: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (sum, name) = line.split_once(char::is_whitespace)?;
        let name = name.trim_start().trim_start_matches('*').trim_end();
        let name = name.rsplit('/').next().unwrap_or(name);
        let sum = sum.to_ascii_lowercase();
        (name == asset && release::is_sha256(&sum)).then_some(sum)
    })
}

/// Downloads into a file and gives the sha256 of what came.
pub(super) async fn download(
    http: &Client,
    url: &Url,
    name: &str,
    into: &NamedTempFile,
    ui: Ui,
) -> Result<String, Error> {
    let too_large = || Error::TooLarge {
        url: url.clone(),
        limit: MAX_BYTES,
    };
    let mut response = get(http, url).await?;
    let total = response.content_length();
    if total.is_some_and(|total| total > MAX_BYTES) {
        return Err(too_large());
    }
    let bar = progress::bytes(ui, name, total);
    if !ui.watched() {
        ui.say(format!("  downloading {url}"));
    }
    let (mut sum, mut count) = (Sha256::new(), 0);
    while let Some(bytes) = response.chunk().await.map_err(failed(url))? {
        count += bytes.len() as u64;
        if count > MAX_BYTES {
            return Err(too_large());
        }
        sum.update(&bytes);
        // Pieces are small, and nothing else goes on in this process.
        let written = into.as_file().write_all(&bytes);
        written.map_err(Error::io("write", into.path()))?;
        bar.inc(bytes.len() as u64);
    }
    bar.finish_and_clear();
    Ok(sum
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_as_sha256sum_writes_them() {
        let sum = "ab".repeat(32);
        for text in [
            format!("{sum}  a.tgz\n"),
            format!("{sum} *a.tgz"),
            format!("{}  b.tgz\n{sum}  ./dir/a.tgz\r\n", "00".repeat(32)),
            format!("{}  a.tgz", sum.to_uppercase()),
        ] {
            assert_eq!(sum_of(&text, "a.tgz"), Some(sum.clone()), "{text}");
        }
        for text in [
            "",
            "a.tgz",
            &sum,
            &format!("{sum}  b.tgz"),
            &format!("{}  a.tgz", &sum[1..]),
            &format!("{}g  a.tgz", &sum[1..]),
        ] {
            assert_eq!(sum_of(text, "a.tgz"), None, "{text}");
        }
    }
}
