//! What an instance has of the host's network, whoever left it: shown, and removed when it has no machine.

use std::num::NonZeroU16;

use hutch_net::bridge::{self, Found};
use hutch_net::link::Links;
use hutch_net::{firewall, label_prefix};
use tracing::{info, warn};

use super::settle::number;
use super::uid;
use crate::Error;

/// Kind and name of all that the kernel lets us see. `instance`: how it calls itself to whoever finds it.
pub(crate) fn inventory(tag: &str, instance: &str) -> Vec<(&'static str, String)> {
    let number = number(tag);
    let mut all = Vec::new();
    if let Ok(mut links) = Links::open() {
        let taps = links.names(&label_prefix(tag)).unwrap_or_default();
        all.extend(taps.into_iter().map(|name| ("tap", name)));
        let claims = links.claims(number).unwrap_or_default();
        all.extend(claims.iter().map(|network| (CLAIM, network.to_string())));
    }
    let on_bridges = bridge::inventory(instance, number).unwrap_or_default();
    all.extend(on_bridges.into_iter().map(|found| match found {
        Found::Bridge(name) => (BRIDGE, name),
        Found::Neighbour(bridge, address) => ("neighbour", format!("{bridge} {address}")),
    }));
    let tables = firewall::inventory(tag).unwrap_or_default();
    all.extend(tables.into_iter().map(|name| (FIREWALL, name)));
    all
}

/// What a server has as long as it runs, also without machines.
pub(crate) const FIREWALL: &str = "firewall";
pub(crate) const CLAIM: &str = "claimed network";
pub(crate) const BRIDGE: &str = "bridge";

/// Removes all that an earlier server left, for an instance without machines: it may have been killed, and this one may
/// be told to have another network, or none.
pub(super) fn clear(tag: &str, instance: &str) -> Result<(), Error> {
    let number = number(tag);
    let mut links = Links::open()?;
    let prefix = label_prefix(tag);
    let mut any = false;
    for name in links.names(&prefix)? {
        if let Some(slot) = name
            .strip_prefix(&prefix)
            .and_then(|slot| slot.parse().ok())
        {
            // Of a VMM that nobody knows any more: it must not get out from behind the firewall.
            links.down(&name, uid(slot))?;
            any = true;
        }
    }
    any |= bridge::clear(instance, number)?;
    any |= give_up(&mut links, number)?;
    any |= firewall::clear(tag)?;
    if any {
        info!("removed what an earlier server left of its network");
    }
    Ok(())
}

fn give_up(links: &mut Links, number: NonZeroU16) -> Result<bool, Error> {
    let claims = links.claims(number)?;
    for network in &claims {
        links.give_up(network, number)?;
    }
    Ok(!claims.is_empty())
}

/// [`clear`], which keeps nobody from starting.
pub(super) fn try_clear(tag: &str, instance: &str) {
    // Others have made nothing there, and may not look.
    if !rustix::process::geteuid().is_root() {
        return;
    }
    if let Err(error) = clear(tag, instance) {
        warn!(error = %error.chain(), "what an earlier server left of its network cannot be removed");
    }
}
