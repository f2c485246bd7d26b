//! The tables stay what they are.

use std::time::Duration;

use hutch_net::elements::Machine;
use hutch_net::firewall::{Error, Firewall, Verified};
use hutch_netlink::nft::{Batch, Element, Expression, Family, Nft, Table, Verdict};

use crate::bed::{config, in_own_network, machine};

fn table(family: Family) -> Table {
    Table {
        family,
        name: "hutch_ab12".into(),
    }
}

/// Every set with how many elements it has, and the number of rules.
fn inventory(nft: &mut Nft) -> (Vec<(String, usize)>, usize) {
    let (mut sets, mut rules) = (Vec::new(), 0);
    for family in [Family::Inet, Family::Arp] {
        let table = table(family);
        for set in nft.sets(&table).unwrap() {
            let count = nft.elements(&table, &set).unwrap().len();
            sets.push((set, count));
        }
        rules += nft.rules(&table).unwrap().len();
    }
    (sets, rules)
}

#[test]
fn five_hundred_machines_come_and_go_and_leave_nothing() {
    in_own_network(|| {
        let mut firewall = Firewall::open(config(true), Vec::new()).unwrap();
        let mut nft = Nft::open().unwrap();
        let before = inventory(&mut nft);
        for slot in 0..500 {
            firewall.add(machine(slot)).unwrap();
        }
        let (sets, _) = inventory(&mut nft);
        assert!(sets.contains(&("from6".into(), 1000)), "{sets:?}");
        assert_eq!(firewall.verify().unwrap(), Verified::Sound);
        for slot in 0..500 {
            firewall.remove(&machine(slot).label).unwrap();
        }
        assert_eq!(inventory(&mut nft), before);
    });
}

#[test]
fn a_batch_that_fails_changes_nothing() {
    in_own_network(|| {
        let _firewall = Firewall::open(config(false), vec![machine(1)]).unwrap();
        let mut nft = Nft::open().unwrap();
        let before = inventory(&mut nft);
        let mut batch = Batch::default();
        let inet = table(Family::Inet);
        batch.add(&inet, "machines4", &[Element::new([172, 16, 9, 9])]);
        batch.delete(&inet, "machines4", &[Element::new([172, 16, 9, 8])]);
        let error = nft.commit(&batch, None).unwrap_err();
        assert_eq!(error.errno(), Some(rustix::io::Errno::NOENT), "{error}");
        let mut batch = Batch::default();
        let to_nowhere = Expression::Verdict(Verdict::Goto("nowhere".into()));
        batch.delete_rules(&inet);
        batch.rule(&inet, "spoof", &[to_nowhere]);
        nft.commit(&batch, None).unwrap_err();
        let generation = nft.generation().unwrap();
        let mut batch = Batch::default();
        batch.delete_table(&inet);
        nft.commit(&batch, Some(generation.wrapping_sub(1)))
            .unwrap_err();
        assert_eq!(inventory(&mut nft), before);
    });
}

#[test]
fn what_somebody_flushes_is_noticed_and_comes_back() {
    in_own_network(|| {
        let machines: Vec<Machine> = (1..4).map(machine).collect();
        let mut firewall = Firewall::open(config(false), machines).unwrap();
        let mut events = firewall.events().unwrap();
        let mut nft = Nft::open().unwrap();
        let before = inventory(&mut nft);
        assert!(!events.wait(Duration::ZERO).unwrap());
        // Our own changes wake nobody.
        firewall.add(machine(9)).unwrap();
        firewall.remove(&machine(9).label).unwrap();
        assert!(!events.wait(Duration::from_millis(50)).unwrap());
        let damage: [&dyn Fn(&mut Batch); 5] = [
            // What `nft flush ruleset` does.
            &|batch| {
                batch.delete_table(&table(Family::Inet));
                batch.delete_table(&table(Family::Arp));
            },
            &|batch| batch.delete_table(&table(Family::Arp)),
            &|batch| batch.delete_rules(&table(Family::Inet)),
            &|batch| {
                let opens = Expression::Verdict(Verdict::Accept);
                batch.rule(&table(Family::Inet), "sane", &[opens]);
            },
            &|batch| {
                let inet = table(Family::Inet);
                batch.add(&inet, "machines4", &[Element::new([10, 0, 0, 1])]);
                batch.delete(&inet, "out4", &[Element::new([172, 16, 0, 1])]);
            },
        ];
        for (number, damage) in damage.iter().enumerate() {
            let mut batch = Batch::default();
            damage(&mut batch);
            nft.commit(&batch, None).unwrap();
            assert!(events.wait(Duration::from_secs(10)).unwrap(), "{number}");
            assert_eq!(firewall.verify().unwrap(), Verified::Repaired, "{number}");
            assert_eq!(inventory(&mut nft), before, "{number}");
            assert_eq!(firewall.verify().unwrap(), Verified::Sound, "{number}");
        }
        // Other tables are others' business.
        let mut batch = Batch::default();
        let theirs = Table {
            family: Family::Inet,
            name: "theirs".into(),
        };
        batch.table(&theirs, 0, "");
        nft.commit(&batch, None).unwrap();
        assert!(!events.wait(Duration::from_millis(50)).unwrap());
        assert_eq!(firewall.verify().unwrap(), Verified::Sound);
    });
}

#[test]
fn a_change_heals_what_it_meets() {
    in_own_network(|| {
        let mut firewall = Firewall::open(config(false), vec![machine(1), machine(2)]).unwrap();
        let mut nft = Nft::open().unwrap();
        let mut batch = Batch::default();
        batch.delete_table(&table(Family::Inet));
        nft.commit(&batch, None).unwrap();
        firewall.remove(&machine(1).label).unwrap();
        let (sets, _) = inventory(&mut nft);
        assert!(sets.contains(&("machines4".into(), 1)), "{sets:?}");
        assert_eq!(firewall.verify().unwrap(), Verified::Sound);
    });
}

#[test]
fn the_next_server_takes_the_tables_over() {
    for own in [false, true] {
        in_own_network(move || {
            let firewall = Firewall::open(config(own), vec![machine(1), machine(2)]).unwrap();
            let owned = firewall.is_owner();
            if own && !owned {
                eprintln!("skipped: this kernel has no tables with owners that persist");
            }
            if owned {
                let second = Firewall::open(config(own), vec![machine(1)]).unwrap_err();
                assert!(matches!(second, Error::Owned { .. }), "{second}");
                let mut batch = Batch::default();
                batch.delete_rules(&table(Family::Inet));
                let foreign = Nft::open().unwrap().commit(&batch, None).unwrap_err();
                assert_eq!(foreign.errno(), Some(rustix::io::Errno::PERM), "{foreign}");
            }
            drop(firewall);
            let mut nft = Nft::open().unwrap();
            let mut before = nft.table(&table(Family::Inet)).unwrap().unwrap();
            assert_eq!(before.owner, None);
            let mut resolved = Element::new([172, 16, 0, 2, 203, 0, 113, 10]);
            resolved.timeout = Some(600_000);
            let mut batch = Batch::default();
            batch.add(&table(Family::Inet), "names4", &[resolved]);
            nft.commit(&batch, None).unwrap();
            let (sets, _) = inventory(&mut nft);
            assert!(sets.contains(&("machines4".into(), 2)), "{sets:?}");
            let mut firewall = Firewall::open(config(own), vec![machine(2), machine(3)]).unwrap();
            let after = nft.table(&table(Family::Inet)).unwrap().unwrap();
            assert_eq!(after.owner.is_some(), owned);
            (before.owner, before.flags) = (after.owner, after.flags);
            assert_eq!(after, before);
            let names = nft.elements(&table(Family::Inet), "names4").unwrap();
            assert_eq!(names.len(), 1);
            assert_eq!(firewall.verify().unwrap(), Verified::Sound);
            let found = nft.elements(&table(Family::Inet), "machines4").unwrap();
            let mut found: Vec<_> = found.into_iter().map(|found| found.element.key).collect();
            found.sort();
            assert_eq!(found, [[172, 16, 0, 2], [172, 16, 0, 3]]);
            drop(firewall);
            // Another version of the rules.
            let mut other = config(own);
            other.rules.dns_port = Some(5353);
            let mut firewall = Firewall::open(other, vec![machine(3)]).unwrap();
            assert_eq!(firewall.verify().unwrap(), Verified::Sound);
            let found = nft.elements(&table(Family::Inet), "dns").unwrap();
            assert_eq!(found.len(), 1);
        });
    }
}

#[test]
fn machines_that_are_alike_are_refused() {
    in_own_network(|| {
        let mut firewall = Firewall::open(config(false), vec![machine(1)]).unwrap();
        let mut twin = machine(2);
        twin.ipv4 = machine(1).ipv4;
        let error = firewall.add(twin).unwrap_err();
        assert!(matches!(error, Error::Taken { .. }), "{error}");
        let mut stranger = machine(3);
        stranger.label = "eth0".into();
        let error = firewall.add(stranger).unwrap_err();
        assert!(matches!(error, Error::Label { .. }), "{error}");
        assert_eq!(firewall.machines().len(), 1);
    });
}
