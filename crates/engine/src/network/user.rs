//! Machines of a server without root: their connections are carried out by passt, behind a filter in the shim.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use hutch_contract::network::{Egress, NetworkPolicy};
use hutch_contract::record::MachineRecord;
use hutch_guest::session::Configure;
use hutch_net::address::{Addresses, CANDIDATES, GATEWAY, GATEWAY_MAC, MACHINE_MAC};
use hutch_net::cidr::Cidr;
use hutch_net::private::{METADATA, PRIVATE4};
use hutch_runtime::{Nic, UserNet};

use super::Plug;

/// What all machines share.
#[derive(Debug, Clone)]
pub(crate) struct User {
    program: PathBuf,
    addresses: Addresses,
    /// Not reached, each an address and the length of its prefix.
    refuse: Vec<(Ipv4Addr, u8)>,
}

impl User {
    /// With passt, which works here. `private`: ranges that count so beside those of the standards.
    pub fn new(program: PathBuf, tag: &str, private: &[Cidr]) -> Option<User> {
        let ranges = PRIVATE4.iter().chain(private);
        let ranges = ranges.map(|range| (range.first(), range.prefix()));
        let metadata = METADATA.iter().map(|address| (*address, 32));
        let refuse = ranges
            .chain(metadata)
            .filter_map(|(address, prefix)| match address {
                IpAddr::V4(address) => Some((address, prefix)),
                IpAddr::V6(_) => None,
            });
        Some(User {
            program,
            // Seen in the guest only.
            addresses: Addresses::new(tag, CANDIDATES[0], [0; 5]).ok()?,
            refuse: refuse.collect(),
        })
    }

    /// What a machine is plugged into.
    pub fn plug(&self, record: &MachineRecord) -> Plug {
        let machine = self.addresses.machine(record.slot);
        let machine = machine.filter(|_| record.network.egress != Egress::None);
        let Some(machine) = machine else {
            return Plug::restricted();
        };
        let card = UserNet {
            program: self.program.clone(),
            mac: MACHINE_MAC,
            address: machine.ipv4,
            gateway: GATEWAY,
            gateway_mac: GATEWAY_MAC,
            dns: true,
            refuse: self.refuse.clone(),
        };
        Plug {
            nic: Nic::Filtered(card),
            identity: Configure {
                addresses: vec![super::address(machine.ipv4, GATEWAY)],
                dns_servers: vec![GATEWAY.to_string()],
                ..Configure::default()
            },
        }
    }

    /// Whether a policy can be held: what leaves is either public or nothing.
    pub fn holds(policy: &NetworkPolicy) -> bool {
        let NetworkPolicy {
            egress,
            allow,
            deny,
            groups,
        } = policy;
        *egress != Egress::Open && allow.is_empty() && deny.is_empty() && groups.is_empty()
    }
}
