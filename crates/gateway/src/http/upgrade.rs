//! WebSockets: both sides must want the same thing before bytes are copied without being looked at.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use super::body::{Answer, Places};
use super::clients::Busy;
use super::forward::Shared;
use super::headers;
use super::pages::Code;
use super::pool::{self, Target};
use crate::copy;

/// Whether a request asks for a WebSocket. The same as `head` says of its bytes.
pub(super) fn is_wanted<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    let no_body = headers.get(TRANSFER_ENCODING).is_none()
        && headers
            .get(CONTENT_LENGTH)
            .is_none_or(|length| length == "0");
    *request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && agreed(headers)
        && no_body
}

/// One `Upgrade: websocket`, and a `Connection` that names it.
fn agreed(headers: &HeaderMap) -> bool {
    let mut upgrades = headers.get_all(UPGRADE).iter();
    let one = match (upgrades.next(), upgrades.next()) {
        (Some(value), None) => value.as_bytes().eq_ignore_ascii_case(b"websocket"),
        _ => false,
    };
    let connection = headers.get_all(CONNECTION).iter();
    let mut words = connection
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    one && words.any(|word| word.trim().eq_ignore_ascii_case("upgrade"))
}

/// Passes on a request that asks for a WebSocket. `request` has the headers that the guest is to get, but for those of
/// the upgrade itself; the client's end of it is in its extensions.
///
/// The connection to the guest is one of its own and is never used again, whatever the answer is.
pub(super) async fn pass(
    shared: &Arc<Shared>,
    target: Target,
    mut request: Request<Incoming>,
    busy: Busy,
    places: Places,
) -> Result<Response<Answer>, Code> {
    let limits = &shared.limits;
    let stream = pool::dial(&*shared.machines, &target, limits.dial).await?;
    let (mut sender, connection) = pool::builder()
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Code::Broken)?;
    // It ends when the answer's body has been read, or is handed over.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to a guest ended");
        }
    });
    let clients = hyper::upgrade::on(&mut request);
    let mut to_guest = Request::new(Empty::<Bytes>::new());
    *to_guest.uri_mut() = request.uri().clone();
    *to_guest.headers_mut() = std::mem::take(request.headers_mut());
    agree(to_guest.headers_mut());
    let answer = timeout(limits.answer, sender.send_request(to_guest)).await;
    let mut answer = answer
        .map_err(|_| Code::AnswerTimeout)?
        .map_err(|_| Code::Broken)?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return shared.passed_on(answer, busy, None, places);
    }
    if !agreed(answer.headers()) {
        return Err(Code::Broken);
    }
    let guests = hyper::upgrade::on(&mut answer);
    let mut response = Response::new(Answer::Page(None));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = std::mem::take(answer.headers_mut());
    headers::to_client(response.headers_mut(), &shared.base_domain);
    agree(response.headers_mut());
    let (idle, cutting) = (limits.idle, shared.cutting.clone());
    shared.tasks.spawn(async move {
        let cut = busy.conn.cut.clone();
        let copying = async {
            // The client's side is there once it has our answer.
            let (client, guest) = tokio::try_join!(clients, guests)?;
            let (client, guest) = (TokioIo::new(client), TokioIo::new(guest));
            Ok::<_, hyper::Error>(copy::both(client, guest, idle).await)
        };
        tokio::select! {
            copied = copying => tracing::debug!(?copied, machine = target.id, "a WebSocket ended"),
            () = cut.cancelled() => {}
            () = cutting.cancelled() => {}
        }
        drop((busy, places));
    });
    Ok(response)
}

fn agree(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}
