//! The OpenAPI document and its page.

use super::*;

#[tokio::test]
async fn the_document_and_its_page_are_there_without_a_key_and_need_nothing_from_elsewhere() {
    let bench = Bench::new().await;
    let get = |path: &str| Request::get(path.to_owned()).body(Body::empty()).unwrap();
    let (_, json) = bench.send(get("/openapi.json")).await;
    assert_eq!(
        serde_json::from_slice::<Value>(&json).unwrap(),
        bench.document
    );
    assert_eq!(bench.send(get("/docs/json")).await.1, json);
    let (response, page) = bench.send(get("/docs")).await;
    assert_eq!(response.status(), 200);
    let page = String::from_utf8(page).unwrap();
    assert!(
        response.headers()["content-security-policy"]
            .to_str()
            .unwrap()
            .starts_with("default-src 'none'")
    );
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("innerHTML"));
}

#[test]
fn every_operation_has_a_name_of_its_own() {
    let document: Value = serde_json::from_str(&crate::openapi()).unwrap();
    let items = document["paths"].as_object().unwrap().values();
    let operations = items.flat_map(|item| item.as_object().unwrap().values());
    let names: Vec<_> = operations
        .map(|operation| operation["operationId"].as_str().unwrap())
        .collect();
    let different: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(different.len(), names.len(), "{names:?}");
}

#[test]
fn the_document_is_the_one_that_was_reviewed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let now = crate::openapi() + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let reviewed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        now == reviewed,
        "the API has changed: run with UPDATE_GOLDEN=1 and review the diff of {path}"
    );
}
