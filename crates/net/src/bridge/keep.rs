//! What becomes of a bridge while machines are on it: its MAC and addresses change, it goes, it comes again.

use std::collections::BTreeSet;
use std::net::IpAddr;

use hutch_netlink::bridge;
use hutch_netlink::route::{self, Events};

use super::{Bridge, Error, GATEWAY6, Result, addresses, find};
use crate::elements::Machine;
use crate::link::kernel;

/// What of a bridge machines depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Looks {
    link: route::Link,
    addresses: BTreeSet<(IpAddr, u8)>,
    gateway6: bool,
}

/// What [`Bridge::verify`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verified {
    /// All was as it was before.
    Same,
    /// It is another one, or differs: what [`Bridge::link`], [`Bridge::mtu`] and [`Bridge::ipv6`] say may be new.
    Changed,
}

impl Bridge {
    /// Wakes whoever waits on it when somebody changed the bridge, this process among them; then call
    /// [`Bridge::verify`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn events(&self) -> Result<Events> {
        let name = &self.config.name;
        Ok(Events::listen(name).map_err(kernel("listen to", name))?)
    }

    /// Looks at the bridge again: repairs ours, or makes it anew; takes somebody else's as it is now, where it fits.
    /// Taps of these machines that are no ports of it become ports, and what it forgot of them it is told again.
    ///
    /// # Errors
    /// [`Error::Foreign`] and [`Error::Gone`], which leave all as it was; or the kernel refuses.
    pub fn verify(&mut self, machines: &[Machine]) -> Result<Verified> {
        let found = match find(&mut self.socket, &self.config.name)? {
            Some(link) => Some(self.look(link)?),
            None => None,
        };
        let verified = match found {
            None if !self.ours => {
                self.looks = None;
                let name = self.config.name.clone();
                return Err(Error::Gone { name });
            }
            Some(looks) if self.looks.as_ref() == Some(&looks) => Verified::Same,
            _ => {
                self.looks = None;
                self.settle()?;
                Verified::Changed
            }
        };
        let ports = bridge::ports(&mut self.socket, self.index);
        let ports = ports.map_err(kernel("list the ports of", &self.config.name))?;
        let taps = route::links(&mut self.socket, "").map_err(kernel("list", "interfaces"))?;
        let taps: BTreeSet<_> = taps.into_iter().map(|tap| tap.name).collect();
        let ports: BTreeSet<_> = ports.into_iter().map(|port| port.name).collect();
        let there = machines.iter().filter(|it| taps.contains(&it.label));
        for machine in there.filter(|it| !ports.contains(&it.label)) {
            let joined = self.join(machine, None);
            // One that goes meanwhile needs no bridge.
            if find(&mut self.socket, &machine.label)?.is_some() {
                joined?;
            }
        }
        self.remember(machines)?;
        Ok(verified)
    }

    pub(super) fn look(&mut self, link: route::Link) -> Result<Looks> {
        let addresses = addresses(&mut self.socket, &link)?.into_iter().collect();
        let gateway6 = route::has_link_local(&mut self.socket, link.index, GATEWAY6);
        let gateway6 = gateway6.map_err(kernel("list the addresses of", &link.name))?;
        Ok(Looks {
            // They count on, and a carrier comes and goes with the ports.
            link: route::Link {
                counters: route::Counters::default(),
                running: false,
                ..link
            },
            addresses,
            gateway6,
        })
    }
}
