//! Who may come in, and what guests see of how they did.

use std::time::Duration;

use hutch_gateway::Access;

use crate::town::{KEY, Lab, OTHER_KEY, Recorder, header, tokens};

async fn private() -> (Lab, Recorder) {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build_with("web", recorder.behind(), |found| {
        found.access = Access::Private { generation: 4 };
    });
    (lab, recorder)
}

fn token() -> String {
    tokens().mint("mch-web", 4, Duration::from_secs(600))
}

#[tokio::test]
async fn a_private_machine_looks_like_none_at_all() {
    let (lab, recorder) = private().await;
    let nobody = lab.get("nobody.vms.test", "/", "").await;
    for headers in [
        String::new(),
        format!("Authorization: Bearer {OTHER_KEY}\r\n"),
        "Authorization: Basic eDp5\r\n".into(),
        "x-hutch-token: 9999999999.AAAA\r\n".into(),
        format!(
            "Cookie: hutch_access={}\r\nOrigin: http://x.vms.test\r\n",
            token()
        ),
    ] {
        let refused = lab.get("web.vms.test", "/", &headers).await;
        assert_eq!(refused.status, 404, "{headers}");
        let plain = |answer: &crate::town::Answer| {
            let object: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
            (
                object["code"].clone(),
                object["message"].clone(),
                object["hint"].clone(),
            )
        };
        assert_eq!(plain(&refused), plain(&nobody));
    }
    assert!(recorder.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_opened_the_machine_does_not_reach_it() {
    let (lab, recorder) = private().await;
    let token = token();
    for headers in [
        format!("Authorization: Bearer {KEY}\r\n"),
        format!("X-API-Key: {KEY}\r\n"),
        format!("X-Hutch-Token: {token}\r\n"),
        format!("Cookie: a=1; hutch_access={token}; b=2\r\n"),
    ] {
        let answer = lab.get("web.vms.test", "/a?b", &headers).await;
        assert_eq!((answer.status, answer.text()), (200, "/a?b"), "{headers}");
        let head = recorder.last().head.to_lowercase();
        assert!(
            !head.contains(KEY) && !head.contains(&token.to_lowercase()),
            "{head}"
        );
        assert!(!head.contains("hutch_access"), "{head}");
    }
    // The guest's own go on.
    let headers =
        format!("X-Hutch-Token: {token}\r\nAuthorization: Basic eDp5\r\nX-API-Key: app\r\n");
    lab.get("web.vms.test", "/", &headers).await;
    let head = recorder.last().head;
    assert_eq!(header(&head, "authorization"), Some("Basic eDp5"));
    assert_eq!(header(&head, "x-api-key"), Some("app"));
}

#[tokio::test]
async fn a_link_opens_the_machine_in_a_browser() {
    let (lab, recorder) = private().await;
    let link = format!("/page?x=1&hutch_token={}", token());
    let kept = lab.get("web.vms.test", &link, "").await;
    assert_eq!(kept.status, 303);
    let location = kept.header("location").unwrap();
    assert_eq!(location, "http://web.vms.test/page?x=1");
    let cookie = kept
        .header("set-cookie")
        .unwrap()
        .split(';')
        .next()
        .unwrap();
    assert!(recorder.seen.lock().unwrap().is_empty());
    let headers = format!("Cookie: {cookie}\r\n");
    let page = lab.get("web.vms.test", "/page?x=1", &headers).await;
    assert_eq!(page.status, 200);
    assert_eq!(header(&recorder.last().head, "cookie"), None);
}
