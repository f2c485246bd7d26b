//! Each in a network namespace of its own, which goes with its thread.

use std::process::Command;

use super::*;

const OWNER: u32 = 0x7000_0001;

/// Runs a test where it can break nothing, or says why it does not.
fn isolated(test: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root makes network namespaces and taps");
    }
    if let Err(error) = std::fs::File::open(DEVICE) {
        return println!("skipped: {DEVICE}: {error}");
    }
    let thread = std::thread::spawn(move || {
        sys::own_network().expect("a network namespace");
        test();
    });
    thread.join().expect("the test panicked");
}

fn tap(name: &str) -> Tap {
    Tap::new(name, OWNER).expect("a name")
}

/// `ip` in this namespace; `None` where it is not installed.
fn ip(arguments: &str) -> Option<String> {
    match Command::new("ip").args(arguments.split(' ')).output() {
        Ok(output) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) => {
            println!("skipped: the comparison with ip: {error}");
            None
        }
    }
}

#[test]
fn a_tap_is_made_found_opened_and_removed() {
    isolated(|| {
        let tap = tap("hab12-7");
        assert!(matches!(tap.open(), Err(Error::Missing { .. })));
        assert!(tap.make().expect("made"));
        assert!(!tap.make().expect("there already"));
        if let Some(seen) = ip("-details link show hab12-7") {
            for words in [
                "tun type tap pi off vnet_hdr on persist on user 1879048193",
                "state DOWN",
            ] {
                assert!(seen.contains(words), "{words:?} in {seen}");
            }
        }
        let open = tap.open().expect("opened");
        assert!(matches!(tap.open(), Err(Error::InUse { .. })));
        assert!(matches!(tap.remove(), Err(Error::InUse { .. })));
        drop(open);
        assert!(tap.is_there().expect("looked"));
        tap.remove().expect("removed");
        tap.remove().expect("removed already");
        assert!(!tap.is_there().expect("looked"));
    });
}

#[test]
fn nothing_stays_of_many_rounds() {
    isolated(|| {
        for slot in 0..200 {
            let tap = tap(&crate::label("ab12", slot));
            assert!(tap.make().expect("made"));
            tap.remove().expect("removed");
        }
        if let Some(all) = ip("-brief link show") {
            assert!(!all.contains("hab12"), "{all}");
        }
    });
}

#[test]
fn what_is_no_tap_of_ours_is_refused_and_left_alone() {
    isolated(|| {
        let ours = tap("hab12-7");
        let refused = |because: &str| {
            for error in [
                ours.make().map(drop).expect_err(because),
                ours.open().map(drop).expect_err(because),
                ours.remove().expect_err(because),
            ] {
                assert!(matches!(error, Error::Foreign { .. }), "{error}");
                assert!(error.to_string().contains(because), "{error}");
            }
        };
        // Of somebody who has it open, and of nobody.
        let tun = ours.device().expect("a device");
        sys::attach(&tun, "hab12-7", sys::TAP).expect("made");
        refused("gone with who made it");
        sys::set_persistent(&tun, true).expect("kept");
        drop(tun);
        refused("no owner");
        let theirs = Tap::new("hab12-8", OWNER + 1).expect("a name");
        theirs.make().expect("made");
        let wrong = Tap::new("hab12-8", OWNER).expect("a name");
        let words = wrong.remove().expect_err("another's").to_string();
        assert!(words.contains("belongs to the user 1879048194"), "{words}");
        assert!(theirs.is_there().expect("looked"));
        for (add, because) in [
            ("tuntap add hab12-7 mode tun user 1879048193", "a tun"),
            ("link add hab12-7 type bridge", "\"bridge\""),
        ] {
            ip("link delete hab12-7");
            if ip(add).is_some() {
                refused(because);
            }
        }
        // Every namespace has one.
        let loopback = Tap::new("lo", OWNER).expect("a name").make();
        assert!(
            matches!(loopback, Err(Error::Foreign { .. })),
            "{loopback:?}"
        );
    });
}

#[test]
fn a_name_is_plain() {
    for name in [
        "",
        "h%d",
        "a/b",
        "a b",
        "..",
        "hab12-7\0",
        "0123456789abcdef",
    ] {
        assert!(
            matches!(Tap::new(name, OWNER), Err(Error::Name { .. })),
            "{name:?}"
        );
    }
}
