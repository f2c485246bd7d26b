//! What all requests have in common: ids, panics, clients that leave, the end of the server.

use super::*;

#[tokio::test]
async fn a_request_keeps_a_good_id_and_loses_a_bad_one() {
    let bench = Bench::new().await;
    for (given, kept) in [
        ("abc-DEF_1.2", true),
        (&"x".repeat(64)[..], true),
        (&"x".repeat(65)[..], false),
        ("a b", false),
        ("a\"b", false),
        ("", false),
    ] {
        let request = Request::get("/health")
            .header("x-request-id", given)
            .body(Body::empty())
            .unwrap();
        let (response, _) = bench.send(request).await;
        let answered = response.headers()["x-request-id"].to_str().unwrap();
        assert_eq!(answered == given, kept, "{given}: {answered}");
        assert!(!answered.is_empty());
    }
}

#[tokio::test]
async fn a_panic_is_one_request_s_fault() {
    let bench = Bench::new().await;
    let routes = Router::new().route(
        "/boom",
        axum::routing::get(|| async { panic!("a secret reason") as () }),
    );
    let routes = around_all(routes).with_state(bench.app.clone());
    let (response, body) = bench
        .send_to(routes, Request::get("/boom").body(Body::empty()).unwrap())
        .await;
    assert_eq!(response.status(), 500);
    assert!(!String::from_utf8(body).unwrap().contains("secret reason"));
    let failed = bench
        .app
        .to_its_end(async { panic!("another") as Result<(), hutch_engine::Error> })
        .await;
    assert_eq!(failed.unwrap_err().status, 500);
}

#[tokio::test]
async fn a_change_goes_on_when_its_client_has_gone() {
    let bench = Bench::new().await;
    let (tell, told) = tokio::sync::oneshot::channel();
    let mut change = Box::pin(bench.app.to_its_end(async move {
        tokio::task::yield_now().await;
        tell.send(())
            .map_err(|()| hutch_engine::Error::Unauthenticated)
    }));
    assert!(futures::poll!(change.as_mut()).is_pending());
    drop(change);
    told.await.expect("it came to its end");
}

#[tokio::test]
async fn waiting_ends_with_the_server() {
    let bench = Bench::new().await;
    bench.app.closing.cancel();
    let waited = bench
        .app
        .unless_closing(std::future::pending::<Result<(), hutch_engine::Error>>())
        .await;
    assert_eq!(waited.unwrap_err().status, 503);
}
