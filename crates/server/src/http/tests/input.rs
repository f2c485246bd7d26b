//! Bad requests: routes, bodies, queries and references.

use super::*;

#[tokio::test]
async fn what_is_no_route_says_so_in_json() {
    let bench = Bench::new().await;
    for path in [
        "/",
        "/v1",
        "/v1/machine",
        "/v1/machines/",
        "/v1/machines/a/b/c",
        "/v2/machines",
        "//v1/machines",
        "/docs/x",
    ] {
        let (status, error) = bench.ask(Request::get(path), "").await;
        assert_eq!(
            (status.as_u16(), error.code.as_str()),
            (404, "no_such_route"),
            "{path}"
        );
    }
    for (method, path, allowed) in [
        ("PATCH", "/v1/machines", "POST,GET,HEAD"),
        ("POST", "/v1/machines/a", "GET,HEAD,DELETE,PATCH"),
        ("GET", "/v1/machines/a/start", "POST"),
        ("TRACE", "/v1/images", "GET,HEAD"),
        ("DELETE", "/health", "GET,HEAD"),
        ("QWERTY", "/openapi.json", "GET,HEAD"),
    ] {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("x-api-key", TOKEN);
        let (response, body) = bench.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!(response.status(), 405, "{method} {path}");
        let allow = response.headers()[header::ALLOW].to_str().unwrap();
        let sorted = |text: &str| {
            let mut words: Vec<_> = text.split(',').map(|word| word.trim().to_owned()).collect();
            words.sort();
            words
        };
        assert_eq!(sorted(allow), sorted(allowed), "{method} {path}");
        assert!(
            String::from_utf8(body)
                .unwrap()
                .contains("method_not_allowed")
        );
    }
}

#[tokio::test]
async fn a_bad_body_is_refused_with_the_field_named() {
    let bench = Bench::new().await;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_field = format!(r#"{{"image":{deep}}}"#);
    let cases: [(&[u8], &str); 20] = [
        (b"", "must be a JSON object"),
        (b"{", "EOF"),
        (b"null", "must be a JSON object"),
        (
            br#"["x",null,null,null,null,null,{},{},false]"#,
            "must be a JSON object",
        ),
        (b"{}", "image"),
        (br#"{"image":"x"} {}"#, "trailing"),
        (br#"{"image":"x","image":"y"}"#, "duplicate field `image`"),
        (
            br#"{"image":"x","vcpu":1,"vcpu":64}"#,
            "duplicate field `vcpu`",
        ),
        (br#"{"image":"x","owner":"own-1"}"#, "unknown field `owner`"),
        (
            br#"{"image":"x","__proto__":{}}"#,
            "unknown field `__proto__`",
        ),
        (br#"{"image":7}"#, "image: invalid type"),
        (br#"{"image":"x","vcpu":-1}"#, "vcpu: invalid value"),
        (br#"{"image":"x","vcpu":1.5}"#, "vcpu: invalid type"),
        (
            br#"{"image":"x","memory_mib":"4"}"#,
            "memory_mib: invalid type",
        ),
        (
            br#"{"image":"x","memory_mib":18446744073709551616}"#,
            "memory_mib: invalid",
        ),
        (br#"{"image":"x","disk_gib":1e400}"#, "number out of range"),
        (br#"{"image":"x","disk_gib":NaN}"#, "expected value"),
        (br#"{"image":"x","name":"../x"}"#, "name: "),
        (b"{\"image\":\"\xff\"}", "unicode"),
        (b"\xef\xbb\xbf{\"image\":\"x\"}", "must be a JSON object"),
    ];
    let post = || Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    for (body, part) in cases {
        let (status, error) = bench.ask(post(), body.to_vec()).await;
        let sent = String::from_utf8_lossy(body);
        assert_eq!(status, 400, "{sent}: {}", error.message);
        assert!(
            error.message.contains(part),
            "{sent}: `{}` lacks `{part}`",
            error.message
        );
    }
    for body in [deep, deep_field] {
        let (status, error) = bench.ask(post(), body).await;
        assert_eq!(status, 400, "{}", error.message);
        assert!(error.message.len() < 1000);
    }
    let lone_surrogate = r#"{"image":"\ud800"}"#;
    assert_eq!(bench.ask(post(), lone_surrogate).await.0, 400);
    // A message quotes what it refuses: it must not carry a terminal's commands.
    let (_, error) = bench
        .ask(post(), "{\"image\":\"x\",\"\\u001b[2J\\u202e\":1}")
        .await;
    assert!(
        !error.message.contains(['\u{1b}', '\u{202e}']),
        "{:?}",
        error.message
    );
}

#[tokio::test]
async fn a_body_of_another_type_or_compressed_is_refused() {
    let bench = Bench::new().await;
    let body = r#"{"image":"x"}"#;
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "",
        "multipart/form-data",
    ] {
        let request = Request::post("/v1/machines").header(header::CONTENT_TYPE, kind);
        assert_eq!(bench.ask(request, body).await.0, 415, "{kind}");
    }
    assert_eq!(bench.ask(Request::post("/v1/machines"), body).await.0, 415);
    let json = || {
        Request::post("/v1/machines")
            .header(header::CONTENT_TYPE, "application/json; charset=utf-8")
    };
    assert_eq!(
        bench
            .ask(json().header(header::CONTENT_ENCODING, "gzip"), body)
            .await
            .0,
        415
    );
    assert_eq!(
        bench.ask(json(), body).await.0,
        404,
        "the right type goes on to the image that is not there"
    );
    let upload =
        Request::put("/v1/machines/x/files?path=/x").header(header::CONTENT_ENCODING, "zstd");
    assert_eq!(bench.ask(upload, body).await.0, 415);
}

#[tokio::test]
async fn a_json_body_has_a_largest_size_whether_it_says_so_or_not() {
    let bench = Bench::new().await;
    let post = || Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    let announced = post().header(header::CONTENT_LENGTH, u64::MAX);
    assert_eq!(bench.ask(announced, "{").await.0, 413);
    let endless = futures::stream::repeat_with(|| {
        Ok::<_, std::io::Error>(bytes::Bytes::from_static(&[b' '; 4096]))
    });
    let (status, error) = bench.ask(post(), Body::from_stream(endless)).await;
    assert_eq!((status.as_u16(), error.code.as_str()), (413, "too_large"));
    let padded = format!("{}{}", " ".repeat(1024 * 1024 - 13), r#"{"image":"x"}"#);
    assert_eq!(
        bench.ask(post(), padded.clone()).await.0,
        404,
        "1 MiB is not yet too large"
    );
    assert_eq!(bench.ask(post(), format!(" {padded}")).await.0, 413);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let bench = Bench::new().await;
    let never = || Body::from_stream(futures::stream::pending::<std::io::Result<bytes::Bytes>>());
    let json = Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    let (status, error) = bench.ask(json, never()).await;
    assert_eq!((status.as_u16(), error.code.as_str()), (408, "slow_body"));
}

#[tokio::test]
async fn a_bad_query_is_refused_with_the_parameter_named() {
    let bench = Bench::new().await;
    for (path, part) in [
        ("/v1/machines?limit=0", "limit"),
        ("/v1/machines?limit=1001", "limit"),
        ("/v1/machines?limit=-1", "limit"),
        ("/v1/machines?limit=many", "limit"),
        ("/v1/machines?status=dancing", "status"),
        ("/v1/machines?stauts=running", "stauts"),
        ("/v1/machines?key=secret", "unknown field `key`"),
        ("/v1/machines?limit=1&limit=2", "limit"),
        ("/v1/images?limit=0", "limit"),
        ("/v1/machines/a/files", "path"),
        ("/v1/machines/a/files?path=/x&offset=-1", "offset"),
        (
            "/v1/machines/a/files/list?path=/x&limit=4294967296",
            "limit",
        ),
        ("/v1/machines/a/logs?follow=maybe", "follow"),
        (
            "/v1/operations/op-01arz3ndektsv4rrffq69g5fav?after_version=1&timeout_ms=3600001",
            "timeout_ms",
        ),
    ] {
        let (status, error) = bench.ask(Request::get(path), "").await;
        assert_eq!(status, 400, "{path}: {}", error.message);
        assert!(
            error.message.contains(part),
            "{path}: `{}` lacks `{part}`",
            error.message
        );
    }
    for (method, path) in [
        ("POST", "/v1/machines/a/wait"),
        ("POST", "/v1/machines/a/wait?status=sleeping"),
        ("POST", "/v1/machines/a/start?wait=1"),
        (
            "POST",
            "/v1/machines/a/stop?timeout_ms=99999999999999999999",
        ),
        ("DELETE", "/v1/machines/a?timeout_ms=3600001"),
        ("PUT", "/v1/images/import?name=../x&format=tar"),
        ("PUT", "/v1/images/import?name=x&format=rpm"),
        ("PUT", "/v1/machines/a/files?path=/x&mode=0o644"),
        ("PUT", "/v1/machines/a/files?path=/x&mode=99999"),
    ] {
        let request = Request::builder().method(method).uri(path);
        assert_eq!(bench.ask(request, "").await.0, 400, "{method} {path}");
    }
}

#[tokio::test]
async fn hostile_references_name_nothing() {
    let bench = Bench::new().await;
    let long = "a".repeat(10_000);
    for reference in [
        "%2e%2e",
        "..%2f..%2fetc",
        "-rf",
        "%00",
        "%0d%0ax",
        "'%20OR%201=1",
        "mch-",
        &long,
        "MCH-x",
        "%E2%80%AE",
    ] {
        let (status, error) = bench
            .ask(Request::get(format!("/v1/machines/{reference}")), "")
            .await;
        assert_eq!(status, 404, "{reference:.40}");
        assert!(
            !error.message.contains(['\r', '\n', '\0', '\u{202e}']) && error.message.len() < 1000
        );
    }
    assert_eq!(bench.ask(Request::get("/v1/machines/%ff"), "").await.0, 400);
    assert_eq!(
        bench
            .ask(
                Request::get("/v1/operations/mch-01arz3ndektsv4rrffq69g5fav"),
                ""
            )
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn an_idempotency_key_has_bounds() {
    let bench = Bench::new().await;
    let post = || Request::post("/v1/machines").header(header::CONTENT_TYPE, "application/json");
    let body = r#"{"image":"x"}"#;
    for key in ["", &"k".repeat(256), "caf\u{e9}"] {
        assert_eq!(
            bench
                .ask(post().header("idempotency-key", key), body)
                .await
                .0,
            400,
            "{key:.20}"
        );
    }
    let twice = post()
        .header("idempotency-key", "a")
        .header("idempotency-key", "b");
    assert_eq!(bench.ask(twice, body).await.0, 400);
    assert_eq!(
        bench
            .ask(post().header("idempotency-key", "k".repeat(255)), body)
            .await
            .0,
        404
    );
}
