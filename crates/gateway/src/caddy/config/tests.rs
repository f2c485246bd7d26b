//! What is written and taken out, and what stands in the way.

use super::super::{Acme, Admin, Mode};
use super::*;

fn config() -> CaddyConfig {
    CaddyConfig {
        mode: Mode::Existing(Admin::Tcp("localhost:2019".into())),
        tag: "ab12".into(),
        domain: "vms.example.net".into(),
        https_port: 443,
        bind: Vec::new(),
        redirect: true,
        ask_url: "http://127.0.0.1:8080/caddy/check".into(),
        upstream: "/run/hutch/gateway.sock".into(),
        issuer: Issuer::Acme(Acme::default()),
        check_every: std::time::Duration::from_secs(15),
    }
}

fn put_into(current: &Value, config: &CaddyConfig) -> Value {
    put(current, config, Asking::Ask).unwrap().0
}

fn refused(current: &Value) -> Foreign {
    put(current, &config(), Asking::Ask).unwrap_err()
}

fn with_server(server: &Value) -> Value {
    json!({ "apps": { "http": { "servers": { "srv0": server } } } })
}

fn ask() -> Value {
    json!({ "@id": "hutch_ab12_on_demand", "ask": config().ask_url })
}

#[test]
fn an_empty_caddy_gets_a_server_a_policy_and_whom_to_ask() {
    let wanted = json!({
        "@id": "hutch_ab12_made_root",
        "apps": {
            "@id": "hutch_ab12_made_apps",
            "http": {
                "@id": "hutch_ab12_made_http",
                "servers": {
                    "@id": "hutch_ab12_made_servers",
                    "hutch_ab12": {
                        "@id": "hutch_ab12_server",
                        "listen": [":443"],
                        "routes": [{
                            "@id": "hutch_ab12_route",
                            "match": [{ "host": ["*.vms.example.net"] }],
                            "terminal": true,
                            "handle": [{
                                "handler": "reverse_proxy",
                                "upstreams": [{ "dial": "unix//run/hutch/gateway.sock" }],
                            }],
                        }],
                        "automatic_https": { "disable_redirects": false },
                        "tls_connection_policies": [{}],
                    },
                },
            },
            "tls": {
                "@id": "hutch_ab12_made_tls",
                "automation": {
                    "@id": "hutch_ab12_made_automation",
                    "policies": [{
                        "@id": "hutch_ab12_policy",
                        "subjects": ["*.vms.example.net"],
                        "on_demand": true,
                        "issuers": [{ "module": "acme" }],
                    }],
                    "on_demand": ask(),
                },
            },
        },
    });
    for empty in [Value::Null, json!({ "apps": null })] {
        let put = put_into(&empty, &config());
        assert_eq!(put["apps"], wanted["apps"]);
        assert_eq!(
            put_into(&put, &config()),
            put,
            "nothing to do the second time"
        );
        assert_eq!(remove(&put, "other"), put);
    }
    let put = put_into(&Value::Null, &config());
    assert_eq!(put, wanted);
    assert_eq!(remove(&put, "ab12"), Value::Null);
}

#[test]
fn what_others_have_is_the_same_while_ours_is_there_and_after() {
    let theirs = json!({
        "admin": { "listen": "localhost:2019" },
        "apps": {
            "http": {
                "grace_period": 10_000_000_000_u64,
                "servers": {
                    "srv0": {
                        "listen": ["tcp/0.0.0.0:443", "[::]:443"],
                        "routes": [
                            { "match": [{ "host": ["example.com"] }], "handle": [] },
                            { "@id": "mine", "handle": [{ "handler": "static_response" }] },
                        ],
                    },
                    "srv1": { "listen": [":8080"], "routes": [] },
                },
            },
            "tls": {
                "automation": {
                    "policies": [{ "subjects": ["example.com"], "issuers": [] }, {}],
                },
            },
            "pki": { "certificate_authorities": { "local": { "install_trust": false } } },
        },
    });
    let config = CaddyConfig {
        issuer: Issuer::Internal,
        ..config()
    };
    let (put, through) = put(&theirs, &config, Asking::Ask).unwrap();
    assert_eq!(through, Through::Theirs);
    let servers = &put["apps"]["http"]["servers"];
    assert_eq!(servers["srv0"]["routes"][0]["@id"], "hutch_ab12_route0");
    assert_eq!(servers["srv0"]["routes"].as_array().unwrap().len(), 3);
    assert_eq!(servers["srv1"], theirs["apps"]["http"]["servers"]["srv1"]);
    assert_eq!(servers.get("hutch_ab12"), None);
    let automation = &put["apps"]["tls"]["automation"];
    assert_eq!(automation["policies"][0]["@id"], "hutch_ab12_policy");
    assert_eq!(automation["policies"].as_array().unwrap().len(), 3);
    assert_eq!(
        put["apps"]["pki"]["certificate_authorities"]["hutch_ab12"],
        json!({ "@id": "hutch_ab12_ca", "name": "Hutch ab12", "install_trust": false })
    );
    assert_eq!(remove(&put, "ab12").to_string(), theirs.to_string());
    assert_eq!(put_into(&put, &config), put);
}

#[test]
fn a_part_that_somebody_moved_or_changed_is_put_right() {
    let theirs = with_server(&json!({ "listen": [":443"], "routes": [{ "handle": [] }] }));
    let put = put_into(&theirs, &config());
    for spoil in [
        |put: &mut Value| {
            let routes = &mut put["apps"]["http"]["servers"]["srv0"]["routes"];
            routes.as_array_mut().unwrap().reverse();
        },
        |put: &mut Value| put["apps"]["tls"]["automation"]["policies"][0]["issuers"] = json!([]),
        |put: &mut Value| put["apps"]["tls"]["automation"]["on_demand"]["ask"] = json!("other"),
        |put: &mut Value| put["apps"]["tls"] = Value::Null,
    ] {
        let mut spoilt = put.clone();
        spoil(&mut spoilt);
        assert!(!is_settled(&spoilt, &put_into(&spoilt, &config())));
        assert_eq!(
            put_into(&spoilt, &config())["apps"]["http"],
            put["apps"]["http"]
        );
        let automation = &put_into(&spoilt, &config())["apps"]["tls"]["automation"];
        assert_eq!(
            automation["policies"],
            put["apps"]["tls"]["automation"]["policies"]
        );
        assert_eq!(automation["on_demand"], ask());
    }
}

#[test]
fn when_somebody_takes_the_port_the_route_moves_there() {
    let mut put = put_into(&Value::Null, &config());
    put["apps"]["http"]["servers"]["srv0"] = json!({ "listen": [":443"], "routes": [] });
    let put = put_into(&put, &config());
    let servers = put["apps"]["http"]["servers"].as_object().unwrap();
    assert!(!servers.contains_key("hutch_ab12"));
    assert_eq!(servers["srv0"]["routes"][0]["@id"], "hutch_ab12_route0");
}

#[test]
fn what_is_not_needed_any_more_goes() {
    let internal = CaddyConfig {
        issuer: Issuer::Internal,
        ..config()
    };
    let mut put = put_into(&put_into(&Value::Null, &internal), &config());
    assert_eq!(put, put_into(&Value::Null, &config()));
    // What others put into an object that we made stays, and then so does the object.
    let theirs = json!({ "listen": [":8080"] });
    put["apps"]["http"]["servers"]["theirs"] = theirs.clone();
    assert_eq!(put_into(&put, &config()), put);
    let left = json!({ "apps": { "http": { "servers": { "theirs": theirs } } } });
    assert_eq!(remove(&put, "ab12"), left);
}

#[test]
fn two_instances_do_not_fight_for_who_is_the_first() {
    let theirs = with_server(&json!({ "listen": [":443"], "routes": [{ "handle": [] }] }));
    let wildcard = |tag: &str| CaddyConfig {
        tag: tag.into(),
        domain: format!("{tag}.example.net"),
        issuer: Issuer::WildcardDns {
            acme: Acme::default(),
            provider: json!({ "name": "rfc2136" }),
        },
        ..config()
    };
    let (one, other) = (wildcard("one"), wildcard("other"));
    let mut both = put_into(&put_into(&theirs, &one), &other);
    for _ in 0..2 {
        for config in [&one, &other] {
            let wanted = put_into(&both, config);
            if !is_settled(&both, &wanted) {
                both = wanted;
            }
        }
    }
    for config in [&one, &other] {
        assert!(is_settled(&both, &put_into(&both, config)));
    }
    let without = remove(&remove(&both, "one"), "other");
    assert_eq!(without["apps"]["http"], theirs["apps"]["http"]);
}

#[test]
fn whom_somebody_else_asks_is_not_changed() {
    let on_demand = |on_demand: Value| json!({ "apps": { "tls": { "automation": { "on_demand": on_demand } } } });
    let asks = refused(&on_demand(
        json!({ "ask": "http://localhost:5555/allowed" }),
    ));
    assert!(
        asks.what.contains("http://localhost:5555/allowed"),
        "{asks:?}"
    );
    assert!(asks.hint.contains("http://127.0.0.1:8080/caddy/check"));
    refused(&on_demand(
        json!({ "permission": { "module": "http", "endpoint": "http://a" } }),
    ));
    refused(&on_demand(json!({ "permission": { "module": "file" } })));
    refused(&on_demand(json!({ "rate_limit": { "burst": 5 } })));
    let without =
        json!({ "apps": { "tls": { "automation": { "policies": [{ "on_demand": true }] } } } });
    refused(&without);
    // The same question is welcome, and stays theirs.
    for same in [
        json!({ "ask": config().ask_url, "rate_limit": { "burst": 5 } }),
        json!({ "permission": { "module": "http", "endpoint": config().ask_url } }),
    ] {
        let put = put_into(&on_demand(same.clone()), &config());
        assert_eq!(put["apps"]["tls"]["automation"]["on_demand"], same);
        assert_eq!(remove(&put, "ab12"), on_demand(same));
    }
}

#[test]
fn the_form_of_the_question_that_caddy_took_stays() {
    let (permission, _) = put(&Value::Null, &config(), Asking::Permission).unwrap();
    assert_eq!(
        permission["apps"]["tls"]["automation"]["on_demand"],
        json!({
            "@id": "hutch_ab12_on_demand",
            "permission": { "module": "http", "endpoint": config().ask_url },
        })
    );
    assert_eq!(put_into(&permission, &config()), permission);
    let elsewhere = CaddyConfig {
        ask_url: "http://127.0.0.1:1/caddy/check".into(),
        ..config()
    };
    let put = put_into(&permission, &elsewhere);
    let on_demand = &put["apps"]["tls"]["automation"]["on_demand"];
    assert_eq!(on_demand["ask"], elsewhere.ask_url);
}

#[test]
fn servers_that_our_route_would_change_are_left_alone() {
    let host = |host: &str| json!([{ "match": [{ "host": ["example.com", host] }] }]);
    let what = |server: Value| refused(&with_server(&server)).what;
    let site = what(json!({ "listen": [":443"], "routes": host("web.vms.example.net") }));
    assert!(site.contains("web.vms.example.net"), "{site}");
    what(json!({ "listen": [":443"], "routes": host("*.vms.example.net") }));
    what(json!({ "listen": [":443"], "automatic_https": { "disable": true } }));
    what(json!({ "listen": [":443"], "automatic_https": { "disable_certificates": true } }));
    what(json!({ "listen": [":443"], "tls_connection_policies": [{ "match": { "sni": ["a"] } }] }));
    // It would begin to speak TLS.
    what(json!({ "listen": [":440-450"], "routes": [{ "handle": [] }] }));
    let policy = json!({ "apps": { "tls": { "automation": {
        "policies": [{ "subjects": ["*.vms.example.net"] }],
    } } } });
    refused(&policy);
    for fine in [
        json!({ "listen": [":443"], "routes": host("vms.example.net") }),
        json!({ "listen": [":443"], "routes": host("a.b.vms.example.net") }),
        json!({ "listen": [":443"], "routes": host("notvms.example.net") }),
        json!({ "listen": [":443", ":8443"], "routes": host("example.com") }),
        json!({ "listen": ["127.0.0.1:443"], "tls_connection_policies": [{ "match": {} }] }),
    ] {
        let put = put(&with_server(&fine), &config(), Asking::Ask).unwrap();
        assert_eq!(put.1, Through::Theirs);
        assert_eq!(remove(&put.0, "ab12"), with_server(&fine));
    }
}

#[test]
fn ports_are_found_in_addresses() {
    for (listen, has) in [
        (":443", true),
        ("0.0.0.0:443", true),
        ("[::1]:443", true),
        ("tcp4/127.0.0.1:400-500", true),
        (":4430", false),
        ("unix//run/a:443", false),
        ("udp/:443", false),
        (":{env.PORT}", false),
    ] {
        assert_eq!(has_port(listen, 443), has, "{listen}");
    }
}

#[test]
fn issuers_are_told_as_caddy_wants_them() {
    let issuer = |issuer| {
        let put = put_into(&Value::Null, &CaddyConfig { issuer, ..config() });
        put["apps"]["tls"]["automation"].clone()
    };
    let acme = Acme {
        email: Some("ops@example.net".into()),
        directory: Some("https://localhost:14000/dir".into()),
        trusted_roots: vec!["/etc/roots.pem".into()],
    };
    let told = json!({
        "module": "acme",
        "email": "ops@example.net",
        "ca": "https://localhost:14000/dir",
        "trusted_roots_pem_files": ["/etc/roots.pem"],
    });
    assert_eq!(
        issuer(Issuer::Acme(acme.clone()))["policies"][0]["issuers"][0],
        told
    );
    let provider = json!({ "name": "cloudflare", "api_token": "secret" });
    let wildcard = Issuer::WildcardDns {
        acme,
        provider: provider.clone(),
    };
    assert!(!format!("{wildcard:?}").contains("secret"));
    let automation = issuer(wildcard);
    let policy = &automation["policies"][0];
    assert_eq!(
        policy["issuers"][0]["challenges"]["dns"]["provider"],
        provider
    );
    assert_eq!(policy.get("on_demand"), None);
    assert_eq!(automation.get("on_demand"), None, "nobody is asked");
}

#[test]
fn some_domains_are_nobodys_in_public() {
    for local in [
        "localhost",
        "vms.localhost",
        "a.internal",
        "vms.test.",
        "x.LOCAL",
    ] {
        assert!(super::super::is_local(local), "{local}");
    }
    for public in ["vms.example.net", "localhost.net", "internal.example"] {
        assert!(!super::super::is_local(public), "{public}");
    }
}
