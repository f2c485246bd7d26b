//! What may be asked for, and who gets what, with real sockets of the loopback.

use hutch_contract::expose::Access;
use hutch_contract::id::OwnerId;
use proptest::prelude::*;

use super::*;

fn reach() -> Reach {
    crate::config::tests::config(std::path::Path::new("/nowhere")).reach
}

fn who(scope: Scope) -> Principal {
    Principal {
        owner: OwnerId::new(),
        scope,
        key: None,
    }
}

fn request(fields: serde_json::Value) -> CreateMachine {
    let mut request = serde_json::json!({ "image": "tiny" });
    request
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    serde_json::from_value(request).unwrap()
}

fn on_loopback(host_port: Option<u16>) -> Want {
    Want {
        guest_port: 80,
        kind: PortKind::Tcp,
        bind: [127, 0, 0, 1].into(),
        host_port,
    }
}

/// Ports that nobody else has right now: three in a row, below those that the system gives out by itself.
fn three_free() -> RangeInclusive<u16> {
    let start = 12_000 + (std::process::id() % 500) as u16 * 32;
    let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let first = (start..u16::MAX - 3).find(|first| (*first..first + 3).all(free));
    let first = first.unwrap();
    first..=first + 2
}

#[test]
fn what_is_left_out_is_the_server_s_choice() {
    let asked = request(serde_json::json!({
        "ssh": true,
        "ports": [{ "guest_port": 80 }, { "guest_port": 81, "host_port": 0 }, { "guest_port": 82, "host_port": 8082 }],
    }));
    let found = wanted(&who(Scope::Owner), &reach(), &asked).unwrap();
    let shown = found.iter().map(|want| (want.guest_port, want.host_port));
    let expected = [(22, None), (80, None), (81, None), (82, Some(8082))];
    assert_eq!(shown.collect::<Vec<_>>(), expected);
    assert_eq!(found[0].kind, PortKind::Ssh);
    assert!(found.iter().all(|want| want.bind.is_loopback()));
    let nothing = request(serde_json::json!({}));
    assert_eq!(wanted(&who(Scope::Owner), &reach(), &nothing).unwrap(), []);
}

#[test]
fn what_cannot_be_meant_is_refused_with_the_field_named() {
    let many: Vec<_> = (0..33)
        .map(|_| serde_json::json!({ "guest_port": 80 }))
        .collect();
    for (ports, field) in [
        (serde_json::json!([{ "guest_port": 0 }]), "guest_port"),
        (
            serde_json::json!([{ "guest_port": 1, "host_port": 80 }]),
            "host_port",
        ),
        (
            serde_json::json!([{ "guest_port": 1, "bind": "0.0.0.0" }]),
            "bind",
        ),
        (
            serde_json::json!([{ "guest_port": 1, "host_port": 9000 }, { "guest_port": 2, "host_port": 9000 }]),
            "ports",
        ),
        (many.into(), "ports"),
    ] {
        let asked = request(serde_json::json!({ "ports": ports }));
        let error = wanted(&who(Scope::Owner), &reach(), &asked).unwrap_err();
        assert!(
            error.to_string().starts_with(&format!("`{field}`")),
            "{error}"
        );
    }
    // The administrator may have any.
    let ports = serde_json::json!([{ "guest_port": 1, "host_port": 80, "bind": "0.0.0.0" }]);
    let asked = request(serde_json::json!({ "ports": ports }));
    assert!(wanted(&who(Scope::Admin), &reach(), &asked).is_ok());
    for fields in [
        serde_json::json!({ "http_port": 0 }),
        serde_json::json!({ "expose": [0] }),
        serde_json::json!({ "expose": (1..=65).collect::<Vec<u16>>() }),
    ] {
        assert!(exposure(&request(fields)).is_err());
    }
}

#[test]
fn exposed_ports_stand_once_and_in_order_and_a_change_of_access_is_a_new_generation() {
    let mut found = exposure(&request(serde_json::json!({ "expose": [3, 1, 3] }))).unwrap();
    assert_eq!(found.expose, Expose::Ports(vec![1, 3]));
    assert_eq!(
        (found.http_port, found.access, found.generation),
        (8080, Access::Private, 0)
    );
    let to = |access| ChangeMachine {
        access: Some(access),
        ..ChangeMachine::default()
    };
    for (access, generation) in [
        (Access::Private, 0),
        (Access::Public, 1),
        (Access::Private, 2),
    ] {
        change(&mut found, &to(access)).unwrap();
        assert_eq!((found.access, found.generation), (access, generation));
    }
    assert_eq!(found.expose, Expose::Ports(vec![1, 3]));
}

#[test]
fn the_lowest_free_port_is_given_and_one_of_another_program_is_passed_over() {
    let range = three_free();
    let first = *range.start();
    let (doors, machine) = (Doors::default(), MachineId::new());
    let take = |port| doors.take(&machine, &on_loopback(port), &range);

    let stranger = TcpListener::bind(("127.0.0.1", first)).unwrap();
    assert_eq!(take(None).unwrap().host_port, first + 1);
    let named = take(Some(first)).unwrap_err();
    assert!(
        matches!(named, Error::PortTaken { ours: false, .. }),
        "{named}"
    );
    drop(stranger);
    assert_eq!(take(None).unwrap().host_port, first);
    assert_eq!(take(None).unwrap().host_port, first + 2);
    let none = take(None).unwrap_err();
    assert!(
        matches!(none, Error::Exhausted { what: "ports", .. }),
        "{none}"
    );
    doors.free(&MachineId::new(), first + 1);
    let still = take(Some(first + 1)).unwrap_err();
    assert!(
        matches!(still, Error::PortTaken { ours: false, .. }),
        "{still}"
    );
    doors.free(&machine, first + 1);
    assert_eq!(take(Some(first + 1)).unwrap().host_port, first + 1);
}

#[test]
fn a_port_is_listened_on_once_it_is_durable_and_only_by_one() {
    let range = three_free();
    let (doors, machine) = (Doors::default(), MachineId::new());
    let given = doors.take(&machine, &on_loopback(None), &range).unwrap();
    assert_eq!(doors.published(), []);
    assert!(TcpListener::bind(("127.0.0.1", given.host_port)).is_err());
    let changes = doors.changes();
    doors.keep([given.host_port]);
    assert!(changes.has_changed().unwrap());
    let published = doors.published();
    assert_eq!(published.len(), 1);
    assert!(doors.take_listener(&published[0]).is_some());
    assert!(doors.take_listener(&published[0]).is_none());
    assert_eq!(doors.show(&given).state, PortState::Listening);
    doors.note(&published[0], PortState::Waiting, Some("no".to_owned()));
    assert_eq!(doors.show(&given).state, PortState::Waiting);
    doors.forget(&machine);
    assert_eq!(doors.published(), []);
    // What a listener says too late is about nobody.
    doors.note(&published[0], PortState::Listening, None);
}

#[test]
fn an_address_that_is_not_the_host_s_is_named() {
    let want = Want {
        bind: "192.0.2.77".parse().unwrap(),
        ..on_loopback(None)
    };
    let refused = Doors::default().take(&MachineId::new(), &want, &three_free());
    assert!(refused.unwrap_err().to_string().starts_with("`bind`"));
}

proptest! {
    #[test]
    fn the_lowest_free_is_what_a_search_finds(
        taken in prop::collection::btree_set(0..40u16, 0..40),
        start in 0..40u16,
        length in 0..40u16,
    ) {
        let range = start..=start + length;
        let expected = range.clone().find(|port| !taken.contains(port));
        let taken = taken.into_iter().map(|port| (port, ())).collect();
        prop_assert_eq!(lowest_free(&taken, range).ok(), expected);
    }

    #[test]
    fn the_last_port_of_all_is_one(taken in any::<bool>()) {
        let all = if taken { BTreeMap::from([(u16::MAX, ())]) } else { BTreeMap::new() };
        prop_assert_eq!(lowest_free(&all, u16::MAX..=u16::MAX).ok(), (!taken).then_some(u16::MAX));
    }
}
