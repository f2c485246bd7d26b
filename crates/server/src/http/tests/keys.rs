//! Every route against every kind of caller.

use super::*;

#[tokio::test]
async fn no_route_answers_without_a_valid_key() {
    let bench = Bench::new().await;
    let admin = bench.admin_key();
    let (id, secret) = admin.split_once('.').unwrap();
    let last = if secret.ends_with('0') { '1' } else { '0' };
    let nearly = format!("{id}.{}{last}", &secret[..secret.len() - 1]);
    let long = "k".repeat(100_000);
    let bearer = |key: &str| vec![("authorization", format!("Bearer {key}"))];
    let callers = [
        vec![],
        bearer(""),
        bearer(&nearly),
        bearer(id),
        bearer(secret),
        bearer(&format!("{TOKEN}x")),
        bearer(&long),
        vec![("authorization", format!("Basic {TOKEN}"))],
        vec![("authorization", TOKEN.to_owned())],
        vec![("x-api-key", nearly.clone())],
        vec![
            ("x-forwarded-for", "127.0.0.1".to_owned()),
            ("forwarded", "for=127.0.0.1".to_owned()),
        ],
        vec![
            ("host", "localhost".to_owned()),
            ("x-real-ip", "127.0.0.1".to_owned()),
        ],
        vec![("cookie", format!("key={TOKEN}"))],
    ];
    for route in bench.routes() {
        for caller in &callers {
            let mut request = Bench::request(&route);
            for (name, value) in caller {
                request = request.header(*name, value);
            }
            let body = route.3.unwrap_or_default();
            let (response, answer) = bench.send(request.body(body.into()).unwrap()).await;
            match route.1.as_str() {
                "/health" => {
                    assert_eq!(response.status(), 200);
                    continue;
                }
                "/caddy/check" => {
                    assert_eq!(response.status(), 404);
                    continue;
                }
                _ => {}
            }
            let caller: Vec<_> = caller.iter().map(|(name, _)| name).collect();
            assert_eq!(
                response.status(),
                401,
                "{} {} let in {caller:?}",
                route.0,
                route.1
            );
            assert_eq!(response.headers()[header::WWW_AUTHENTICATE], "Bearer");
            let answer = String::from_utf8(answer).unwrap();
            assert!(
                !answer.contains(TOKEN) && !answer.contains(secret),
                "{answer}"
            );
        }
    }
}

#[tokio::test]
async fn every_route_answers_a_valid_key_as_the_document_says() {
    let bench = Bench::new().await;
    let admin = bench.admin_key();
    let callers = [
        ("authorization", format!("Bearer {admin}")),
        ("authorization", format!("bearer  {admin} ")),
        ("x-api-key", admin),
        ("x-api-key", TOKEN.to_owned()),
    ];
    for route in bench.routes() {
        for (name, value) in &callers {
            let request = Bench::request(&route).header(*name, value);
            let request = request.body(route.3.unwrap_or_default().into()).unwrap();
            let (response, body) = bench.send(request).await;
            let (method, path, status) = (&route.0, &route.1, response.status());
            let text = String::from_utf8_lossy(&body);
            assert!(
                status != 401 && status != 403 && status != 500,
                "{method} {path}: {status} {text}"
            );
            assert!(
                bench.documented(method, path, status),
                "{method} {path}: {status} is not documented"
            );
            if path.contains("{id}") {
                assert_eq!(status, 404, "{method} {path}: {text}");
            }
        }
    }
}

#[tokio::test]
async fn the_socket_s_owner_needs_no_key_but_a_wrong_one_counts() {
    let bench = Bench::new().await;
    let uid = rustix::process::geteuid().as_raw();
    let ask = |uid: u32, key: Option<&'static str>| {
        let mut request = Request::builder().uri("/v1/machines");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        request
            .extension(Peer::Local { uid })
            .body(Body::empty())
            .unwrap()
    };
    assert_eq!(bench.send(ask(uid, None)).await.0.status(), 200);
    assert_eq!(bench.send(ask(uid, Some("wrong"))).await.0.status(), 401);
    assert_eq!(bench.send(ask(uid + 1, None)).await.0.status(), 401);
    assert_eq!(bench.send(ask(uid + 1, Some(TOKEN))).await.0.status(), 200);
}

#[tokio::test]
async fn a_key_that_may_read_changes_nothing_anywhere() {
    let bench = Bench::new().await;
    let reader = Principal {
        scope: Scope::Read,
        ..bench.app.engine.local_admin()
    };
    // The same routes with another caller put in where `auth` would put one.
    let (routes, _) = keyed().split_for_parts();
    let routes = routes
        .layer(axum::Extension(reader))
        .layer(from_fn(around::around));
    let routes = routes.with_state(bench.app.clone());
    for route in bench
        .routes()
        .into_iter()
        .filter(|route| route.1.starts_with("/v1/"))
    {
        let (method, path) = (&route.0, &route.1);
        let request = Bench::request(&route)
            .body(route.3.unwrap_or_default().into())
            .unwrap();
        let (response, body) = bench.send_to(routes.clone(), request).await;
        let only_looks = method == Method::GET || path.ends_with("/wait");
        let text = String::from_utf8_lossy(&body);
        let status = response.status();
        assert_eq!(
            status == 403,
            !only_looks,
            "{method} {path}: {status} {text}"
        );
    }
}

#[tokio::test]
async fn two_keys_are_no_key() {
    let bench = Bench::new().await;
    let bearer = format!("Bearer {TOKEN}");
    for second in [
        ("authorization", bearer.as_str()),
        ("x-api-key", TOKEN),
        ("x-api-key", "other"),
    ] {
        let request = Request::get("/v1/machines")
            .header("authorization", &bearer)
            .header(second.0, second.1);
        assert_eq!(
            bench
                .send(request.body(Body::empty()).unwrap())
                .await
                .0
                .status(),
            400
        );
    }
}
