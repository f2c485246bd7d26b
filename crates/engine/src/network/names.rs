//! Who is who among machines: what the resolver asks, for every question.
//!
//! It has a lock of its own, so that nobody waits here for the kernel; whoever changes it holds that of
//! [`Routed`](super::routed::Routed).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

use hutch_net::dns::{Asker, Directory, NotRecorded};
use hutch_net::domain::{Domain, Judgement};
use hutch_net::elements;

use super::policy::Member;
use super::routed::Routed;
use crate::drive::blocking;

/// The machines that have a network, by label.
pub(crate) type Members = BTreeMap<String, (elements::Machine, Member)>;

/// What the resolver knows.
#[derive(Default)]
pub(crate) struct Names {
    known: RwLock<Known>,
    /// Who puts into the firewall what was learned.
    routed: OnceLock<Weak<Routed>>,
}

#[derive(Default)]
struct Known {
    members: Members,
    askers: HashMap<IpAddr, Arc<Asker>>,
}

impl Names {
    /// Machines with what the firewall has of each.
    pub fn new(members: Members, machines: &[elements::Machine]) -> Names {
        let names = Names::default();
        names.change(|known| *known = members);
        names.are(machines);
        names
    }

    /// Says who records.
    pub fn recorded_by(&self, routed: &Arc<Routed>) {
        drop(self.routed.set(Arc::downgrade(routed)));
    }

    /// Looks at the machines.
    pub fn members<T>(&self, look: impl FnOnce(&Members) -> T) -> T {
        look(&self.known().members)
    }

    /// Changes them.
    pub fn change<T>(&self, change: impl FnOnce(&mut Members) -> T) -> T {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut known.members);
        let Known { members, askers } = &mut *known;
        askers.retain(|_, asker| members.contains_key(&asker.label));
        changed
    }

    /// From now on the firewall has them so.
    pub fn are(&self, machines: &[elements::Machine]) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        for machine in machines {
            let asker = Arc::new(Asker {
                label: machine.label.clone(),
                policy: machine.policy.clone(),
            });
            for address in [machine.ipv4.into(), machine.ipv6.into()] {
                known.askers.insert(address, asker.clone());
            }
        }
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Directory for Names {
    fn asker(&self, address: IpAddr) -> Option<Arc<Asker>> {
        self.known().askers.get(&address).cloned()
    }

    fn addresses(&self, asker: &Asker, name: &str) -> Option<Vec<IpAddr>> {
        let known = self.known();
        let (_, own) = known.members.get(&asker.label)?;
        let mut members = known.members.values();
        let (machine, _) = members.find(|(_, member)| {
            member.name.as_str() == name && (member.id == own.id || member.shares_a_group(own))
        })?;
        Some(vec![machine.ipv4.into(), machine.ipv6.into()])
    }

    fn name(&self, asker: &Asker, address: IpAddr) -> Option<String> {
        let known = self.known();
        let (_, own) = known.members.get(&asker.label)?;
        let label = &known.askers.get(&address)?.label;
        let (_, member) = known.members.get(label)?;
        let seen = member.id == own.id || member.shares_a_group(own);
        seen.then(|| member.name.to_string())
    }

    async fn record(
        &self,
        asker: &Asker,
        name: &Domain,
        addresses: Vec<IpAddr>,
        lifetime: Duration,
    ) -> Result<Judgement, NotRecorded> {
        let routed = self.routed.get().and_then(Weak::upgrade);
        let routed = routed.ok_or("the server ends")?;
        let (label, name) = (asker.label.clone(), name.clone());
        let learned = blocking("record what a name led to", move || {
            routed.learn(&label, &name, &addresses, lifetime)
        });
        Ok(learned.await?)
    }
}
