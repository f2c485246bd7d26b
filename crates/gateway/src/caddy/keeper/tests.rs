//! How often it is tried, and what is said about failures.

use super::*;

fn refused(message: &str) -> ApiError {
    ApiError::Refused {
        status: 400,
        message: message.into(),
    }
}

#[test]
fn waits_grow_to_a_bound() {
    let every = Duration::from_secs(15);
    let timeout = ApiError::Timeout(Admin::Tcp("localhost:2019".into()));
    assert_eq!(wait(&timeout, 0, every), FIRST);
    assert_eq!(wait(&timeout, 3, every), FIRST * 8);
    assert_eq!(wait(&timeout, u32::MAX, every), every);
    assert_eq!(wait(&refused(""), 0, every), every);
    assert_eq!(wait(&refused(""), u32::MAX, every), every * REFUSED);
}

#[test]
fn hints_fit_what_caddy_says() {
    let module = "unknown module: dns.providers.cloudflare";
    assert!(hint(&refused(module)).contains("xcaddy"));
    let port = "listening on :443: listen tcp :443: bind: address already in use";
    assert!(hint(&refused(port)).contains("port"));
}
