//! Which network an instance's machines are in: found once, on record, and claimed on the host.

use std::num::NonZeroU16;
use std::path::Path;
use std::sync::Arc;

use hutch_contract::record::{FORMAT, MachineRecord};
use hutch_net::address::{Addresses, CANDIDATES};
use hutch_net::cidr::Cidr;
use hutch_net::link::Links;
use hutch_store::{Store, Write};
use serde::{Deserialize, Serialize};

use super::policy::Member;
use super::routed::{Identity, Routed};
use crate::config::NetworkConfig;
use crate::drive::blocking;
use crate::rows::{self, Instance};
use crate::{Error, keys};

/// The network that this data directory's machines are in, for good.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct NetworkRow {
    format: u32,
    /// In CIDR form.
    ipv4: String,
    /// Of the unique local network of IPv6 (RFC 4193).
    global_id: [u8; 5],
    /// Where the resolver was last, so that the rules can stay when a server starts.
    #[serde(default)]
    dns_port: Option<u16>,
    /// The bridge that machines are on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bridge: Option<String>,
}

/// Sixteen bits that tell what is of this instance in the kernel from what others' is: of the tag's twenty.
pub(super) fn number(tag: &str) -> NonZeroU16 {
    let hash = tag.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    NonZeroU16::new((hash >> 16) as u16 ^ hash as u16).unwrap_or(NonZeroU16::MAX)
}

/// The routed network of this instance, taken over or made.
pub(super) async fn routed(
    config: &NetworkConfig,
    store: &dyn Store,
    instance: &Instance,
    data_dir: &Path,
    records: &[MachineRecord],
) -> Result<Arc<Routed>, Error> {
    let number = number(&instance.tag);
    let mut links = blocking("look at the host's network", || Ok(Links::open()?)).await?;
    let addresses;
    let mut row;
    (links, addresses, row) =
        settle(config, store, instance, links, number, !records.is_empty()).await?;
    let members: Vec<_> = records
        .iter()
        .map(|record| (record.slot, Member::of(record)))
        .collect();
    let identity = Identity {
        number,
        tag: instance.tag.clone(),
        instance: data_dir.display().to_string(),
        dns_port: row.dns_port,
    };
    let config = config.clone();
    let runtime = tokio::runtime::Handle::current();
    let routed = blocking("make the firewall", move || {
        let _runtime = runtime.enter();
        Routed::open(&config, &identity, links, addresses, members)
    })
    .await?;
    if row.dns_port != routed.dns_port() {
        row.dns_port = routed.dns_port();
        let write = Write::json(rows::network(), &row)?;
        store.commit(Vec::new(), vec![write]).await?;
    }
    Ok(routed)
}

/// The network that machines are in: the one of earlier servers, the configured one, or one that nobody uses. It is on
/// record before it is claimed.
async fn settle(
    config: &NetworkConfig,
    store: &dyn Store,
    instance: &Instance,
    mut links: Links,
    number: NonZeroU16,
    in_use: bool,
) -> Result<(Links, Addresses, NetworkRow), Error> {
    let key = rows::network();
    let row = store.get_json::<NetworkRow>(&key).await?;
    let known = match &row {
        Some(row) => {
            rows::known_format(&key, row.value.format)?;
            row.value.ipv4.parse::<Cidr>().ok()
        }
        None => None,
    };
    let global_id = row
        .as_ref()
        .map_or_else(keys::random_bytes::<5>, |row| row.value.global_id);
    let bridge_before = row.as_ref().and_then(|row| row.value.bridge.clone());
    if row.is_some() && in_use && bridge_before != config.bridge {
        let words = |bridge: &Option<String>| match bridge {
            Some(name) => format!("of the bridge {name}"),
            None => "without a bridge".to_owned(),
        };
        return Err(Error::NetworkInUse {
            network: words(&bridge_before),
            wanted: words(&config.bridge),
        });
    }
    let mut candidates = match (config.subnet, known) {
        (Some(wanted), Some(known)) if wanted != known && in_use => {
            return Err(Error::NetworkInUse {
                network: known.to_string(),
                wanted: wanted.to_string(),
            });
        }
        (Some(wanted), _) => vec![wanted],
        (None, Some(known)) if in_use => vec![known],
        (None, Some(known)) => std::iter::once(known).chain(CANDIDATES).collect(),
        (None, None) => CANDIDATES.to_vec(),
    };
    let all = candidates.clone();
    while !candidates.is_empty() {
        let network;
        // A bridge that is there has a route to its network.
        let bridge = config.bridge.clone();
        (links, network) = blocking("look at the host's network", move || {
            let there = match &bridge {
                Some(name) => links.names(name)?.contains(name),
                None => false,
            };
            let network = match there {
                true => candidates.first().copied(),
                false => links.unused(&candidates, number)?,
            };
            Ok((links, network))
        })
        .await?;
        let Some(network) = network else {
            break;
        };
        let addresses = Addresses::new(&instance.tag, network, global_id)?;
        let made = NetworkRow {
            format: FORMAT,
            ipv4: network.to_string(),
            global_id,
            dns_port: row.as_ref().and_then(|row| row.value.dns_port),
            bridge: config.bridge.clone(),
        };
        if known != Some(network) || row.is_none() || bridge_before != config.bridge {
            let write = Write::json(key.clone(), &made)?;
            store.commit(Vec::new(), vec![write]).await?;
        }
        if config.bridge.is_some() {
            // Its address is the claim.
            return Ok((links, addresses, made));
        }
        let claimed;
        (links, claimed) = blocking("claim the network", move || {
            let claimed = links.claim(&network, number)?;
            Ok((links, claimed))
        })
        .await?;
        if claimed {
            return Ok((links, addresses, made));
        }
        candidates = all
            .iter()
            .copied()
            .skip_while(|candidate| *candidate != network)
            .skip(1)
            .collect();
    }
    let tried = all.iter().map(Cidr::to_string).collect::<Vec<_>>();
    Err(Error::NetworkTaken {
        networks: tried.join(", "),
    })
}
