//! Addresses that machines learned from the resolver. Those that a name opens or closes are elements of the kernel's
//! `names…` and `noname…`, which go by themselves; all are remembered here with the names that led to them, so that a
//! policy that changes is held to names, too.
//!
//! The rules prolong elements of `names…` that are in use, so the kernel may know an address for longer than its time
//! here says. It is asked before anything is forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use hutch_netlink::nft::{Batch, Element, Family, concatenated};
use rustix::io::Errno;

use super::{Error, Firewall, Result};
use crate::domain::{Domain, Judgement};
use crate::elements::{Elements, Machine, Policy};
use crate::rules::{NAME_IDLE_MS, octets};

/// Addresses, each with its names, that one machine may have learned.
const LEARNED_MAX: usize = 4096;
/// Names by which one address is remembered.
const NAMES_OF_ADDRESS: usize = 64;
/// How often the kernel's sets are read at least, and at most, while machines learn.
const READ_AFTER: Duration = Duration::from_secs(600);
const READ_AGAIN: Duration = Duration::from_secs(10);
/// Transactions that meet an element which has just gone.
const ATTEMPTS: usize = 5;
/// By how much the kernel's clock for elements is coarser than ours.
const COARSE: Duration = Duration::from_millis(200);

/// The sets of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Names,
    Noname,
}

/// An address that a machine learned.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    /// What led to it. Nothing is known of those that an earlier server's machines had learned.
    names: BTreeSet<Domain>,
    /// Until then at least it is in `place`.
    until: Instant,
    /// Where the kernel has it, if a name opens or closes it.
    place: Option<Place>,
}

type Addresses = BTreeMap<IpAddr, Known>;

/// What all machines learned, by label.
#[derive(Debug, Default)]
pub(super) struct Learned {
    machines: BTreeMap<String, Addresses>,
    /// When the kernel's sets were read the last time.
    read: Option<Instant>,
}

/// What the kernel has: by place, machine's address and address.
type Found = BTreeMap<(Place, IpAddr, IpAddr), Duration>;

/// Elements to be removed, and to be added.
#[derive(Debug, Default)]
pub(super) struct Moves {
    pub(super) gone: Elements,
    pub(super) new: Elements,
}

/// What was known of some machines before a change.
#[derive(Debug, Default)]
pub(super) struct Before(Vec<(String, Addresses)>);

impl Place {
    const ALL: [Self; 2] = [Self::Names, Self::Noname];

    fn set(self, own: IpAddr) -> (Family, String) {
        let name = match self {
            Self::Names => "names",
            Self::Noname => "noname",
        };
        let number = if own.is_ipv4() { 4 } else { 6 };
        (Family::Inet, format!("{name}{number}"))
    }
}

impl Moves {
    fn remove(&mut self, place: Place, own: IpAddr, address: IpAddr) {
        let set = self.gone.entry(place.set(own)).or_default();
        set.insert(Element::new(key(own, address)));
    }

    fn add(&mut self, place: Place, own: IpAddr, address: IpAddr, left: Duration) {
        let set = self.new.entry(place.set(own)).or_default();
        let mut element = Element::new(key(own, address));
        element.timeout = Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1));
        set.insert(element);
    }
}

impl Learned {
    /// What the rules say about an address because of its names.
    pub(super) fn judgement(&self, label: &str, address: IpAddr) -> Judgement {
        let known = self.machines.get(label).and_then(|of| of.get(&address));
        match known.and_then(|known| known.place) {
            Some(Place::Names) => Judgement::Allowed,
            Some(Place::Noname) => Judgement::Denied,
            None => Judgement::Unnamed,
        }
    }

    pub(super) fn restore(&mut self, before: Before) {
        self.machines.extend(before.0);
    }
}

impl Firewall {
    /// Remembers that a name led a machine to these addresses for so long, and opens or closes them where its policy
    /// says so of the name. When it returns, the rules know.
    ///
    /// Addresses that the policy does not believe (see [`Policy::believes`]) are left out.
    ///
    /// # Errors
    /// There is no such machine, it has learned too many addresses, or the kernel refuses.
    pub fn learn(
        &mut self,
        label: &str,
        name: &Domain,
        addresses: &[IpAddr],
        lifetime: Duration,
    ) -> Result<Judgement> {
        let machine = self.machine(label)?.clone();
        let judgement = machine.policy.judge(name);
        let networks = &self.config.rules.host_networks;
        let believed = |address: &IpAddr| machine.policy.believes(*address, networks);
        let addresses: Vec<IpAddr> = addresses.iter().copied().filter(believed).collect();
        if self
            .learned
            .read
            .is_none_or(|read| read.elapsed() > READ_AFTER)
        {
            self.read_learned()?;
        }
        self.make_room(label, addresses.len())?;
        for _ in 0..ATTEMPTS {
            let mut moves = Moves::default();
            let mut learned = Addresses::new();
            for address in &addresses {
                let known = self.learn_one(&machine, name, *address, lifetime, &mut moves)?;
                learned.insert(*address, known);
            }
            let mut batch = Batch::default();
            self.delete(&mut batch, &moves.gone);
            self.insert(&mut batch, &moves.new);
            let nothing = batch.is_empty();
            match self.nft.commit(&batch, None) {
                Ok(()) => {
                    let of = self.learned.machines.entry(label.to_owned()).or_default();
                    of.extend(learned);
                    if !nothing {
                        self.changed_once()?;
                    }
                    return Ok(judgement);
                }
                // What was to be removed has just gone by itself.
                Err(error) if error.errno() == Some(Errno::NOENT) => self.read_learned()?,
                Err(error) => return Err(self.failed(error)),
            }
        }
        self.rebuild()?;
        Err(Error::Restless {
            table: self.config.rules.table(),
        })
    }

    /// What is known of the addresses that a machine learned: the names that led to each. Of an address that was
    /// learned before this server started, there is none.
    pub fn learned(&self, label: &str) -> BTreeMap<IpAddr, BTreeSet<Domain>> {
        let of = self.learned.machines.get(label);
        of.into_iter()
            .flatten()
            .map(|(address, known)| (*address, known.names.clone()))
            .collect()
    }

    fn learn_one(
        &mut self,
        machine: &Machine,
        name: &Domain,
        address: IpAddr,
        lifetime: Duration,
        moves: &mut Moves,
    ) -> Result<Known> {
        let own = own(machine, address);
        let now = Instant::now();
        let known = self.learned.machines.get(&machine.label);
        let mut known = match known.and_then(|of| of.get(&address)) {
            Some(known) => known.clone(),
            None => Known {
                names: BTreeSet::new(),
                until: now,
                place: None,
            },
        };
        if let Some(place) = known.place
            && known.until <= now + COARSE
            && !self.has(place, own, address)?
        {
            known.place = None;
        }
        let mut lifetime = lifetime;
        if known.place == Some(Place::Names) {
            // It may be in use, and then the kernel keeps it for so long.
            lifetime = lifetime.max(Duration::from_millis(NAME_IDLE_MS));
        }
        if known.names.len() >= NAMES_OF_ADDRESS && !known.names.contains(name) {
            known.names.pop_first();
        }
        known.names.insert(name.clone());
        let place = known.wanted(&machine.policy);
        let until = now + lifetime;
        if known.place != place || known.until < until {
            known.until = known.until.max(until);
            if let Some(place) = known.place {
                moves.remove(place, own, address);
            }
            if let Some(place) = place {
                moves.add(place, own, address, known.until - now);
            }
            known.place = place;
        }
        Ok(known)
    }

    /// What machines learned, as new machines or policies want it. It is remembered already; the caller makes the
    /// moves, or restores what was known before.
    pub(super) fn relearn(
        &mut self,
        changes: &[(String, Option<Machine>)],
    ) -> Result<(Moves, Before)> {
        let (mut moves, mut before) = (Moves::default(), Before::default());
        let knows = |(label, _): &(String, _)| self.learned.machines.contains_key(label);
        if !changes.iter().any(knows) {
            return Ok((moves, before));
        }
        self.read_learned()?;
        let now = Instant::now();
        let networks = &self.config.rules.host_networks;
        for (label, new) in changes {
            let Some(mut known) = self.learned.machines.remove(label) else {
                continue;
            };
            before.0.push((label.clone(), known.clone()));
            let Some(old) = self.machines.get(label) else {
                continue;
            };
            let stays = new
                .as_ref()
                .filter(|new| new.ipv4 == old.ipv4 && new.ipv6 == old.ipv6);
            for (address, known) in &mut known {
                let place = stays.and_then(|new| {
                    let same = reach(&old.policy) == reach(&new.policy);
                    let judged = same || !known.names.is_empty();
                    let place = known.wanted(&new.policy).filter(|_| judged)?;
                    let lie = place == Place::Names && !new.policy.believes(*address, networks);
                    (!lie).then_some(place)
                });
                if place == known.place {
                    continue;
                }
                let own = own(old, *address);
                if let Some(place) = known.place {
                    moves.remove(place, own, *address);
                }
                let left = known.until.saturating_duration_since(now);
                known.place = place.filter(|_| left > COARSE);
                if let Some(place) = known.place {
                    moves.add(place, own, *address, left);
                }
            }
            if stays.is_some() {
                known.retain(|_, known| known.place.is_some() || !known.names.is_empty());
                self.learned.machines.insert(label.clone(), known);
            }
        }
        Ok((moves, before))
    }

    /// Elements for tables that are made anew.
    pub(super) fn learned_elements(&self) -> Elements {
        let mut moves = Moves::default();
        let now = Instant::now();
        for (own, address, known) in self.all_learned() {
            let left = known.until.saturating_duration_since(now);
            if let Some(place) = known.place.filter(|_| left > COARSE) {
                moves.add(place, own, address, left);
            }
        }
        moves.new
    }

    /// Elements that are there although no machine has learned them, and those that somebody has removed.
    pub(super) fn learned_drift(&mut self) -> Result<Moves> {
        let found = self.find_learned()?;
        let now = Instant::now();
        let mut moves = Moves::default();
        let mut expected = BTreeSet::new();
        for (own, address, known) in self.all_learned() {
            let Some(place) = known.place else { continue };
            expected.insert((place, own, address));
            let left = known.until.saturating_duration_since(now);
            if left > COARSE && !found.contains_key(&(place, own, address)) {
                moves.add(place, own, address, left);
            }
        }
        for (place, own, address) in found.into_keys() {
            if !expected.contains(&(place, own, address)) {
                moves.remove(place, own, address);
            }
        }
        Ok(moves)
    }

    /// Brings what is remembered up to what the kernel has. What it has and nobody remembers was learned before this
    /// server started: it stays until its time is over, or the machine's policy changes.
    pub(super) fn read_learned(&mut self) -> Result<()> {
        let now = Instant::now();
        let found = self.find_learned()?;
        let mut owners: BTreeMap<IpAddr, &str> = BTreeMap::new();
        for machine in self.machines.values() {
            owners.insert(machine.ipv4.into(), &machine.label);
            owners.insert(machine.ipv6.into(), &machine.label);
        }
        let was = std::mem::take(&mut self.learned.machines);
        let mut all: BTreeMap<String, Addresses> = BTreeMap::new();
        for ((place, own, address), left) in &found {
            let Some(label) = owners.get(own) else {
                continue;
            };
            let old = was.get(*label).and_then(|of| of.get(address));
            // One that nobody knows where it is was not put there by us.
            if old.is_some_and(|old| old.place != Some(*place)) {
                continue;
            }
            let old = old.map(|old| (old.names.clone(), old.until));
            let (names, until) = old.unwrap_or_else(|| (BTreeSet::new(), now));
            let known = Known {
                names,
                until: until.max(now + *left),
                place: Some(*place),
            };
            let of = all.entry((*label).to_owned()).or_default();
            of.insert(*address, known);
        }
        for (label, of) in was {
            let there = all.entry(label).or_default();
            for (address, mut known) in of {
                if !there.contains_key(&address) && known.until > now {
                    known.place = None;
                    there.insert(address, known);
                }
            }
        }
        all.retain(|_, of| !of.is_empty());
        self.learned.machines = all;
        self.learned.read = Some(now);
        Ok(())
    }

    fn make_room(&mut self, label: &str, more: usize) -> Result<()> {
        let now = Instant::now();
        let Some(of) = self.learned.machines.get_mut(label) else {
            return Ok(());
        };
        let count = |of: &Addresses| of.values().map(|known| known.names.len().max(1)).sum();
        let fits = |count: usize| count + more <= LEARNED_MAX;
        if fits(count(of)) {
            return Ok(());
        }
        // What no name opens or closes is only remembered in case that a policy changes: half of it may go.
        of.retain(|_, known| known.place.is_some() || known.until > now);
        let mut idle: Vec<Instant> = of
            .values()
            .filter(|known| known.place.is_none())
            .map(|known| known.until)
            .collect();
        idle.sort();
        if let Some(middle) = idle.get(idle.len() / 2).copied() {
            of.retain(|_, known| known.place.is_some() || known.until > middle);
        }
        if fits(count(of)) {
            return Ok(());
        }
        if self
            .learned
            .read
            .is_none_or(|read| read.elapsed() > READ_AGAIN)
        {
            self.read_learned()?;
            let of = self.learned.machines.get(label);
            if of.is_none_or(|of| fits(count(of))) {
                return Ok(());
            }
        }
        Err(Error::Crowded {
            label: label.to_owned(),
        })
    }

    /// Machine's address, address, and what is known of it.
    fn all_learned(&self) -> impl Iterator<Item = (IpAddr, IpAddr, &Known)> {
        let machines = &self.learned.machines;
        machines.iter().flat_map(|(label, of)| {
            let of = self.machines.get(label).map(|machine| (machine, of));
            of.into_iter().flat_map(|(machine, of)| {
                of.iter()
                    .map(|(address, known)| (own(machine, *address), *address, known))
            })
        })
    }

    fn find_learned(&mut self) -> Result<Found> {
        let mut all = Found::new();
        for place in Place::ALL {
            for own in [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()] {
                let (family, set) = place.set(own);
                let table = self.table(family);
                let found = self.nft.elements(&table, &set);
                for found in found.map_err(|source| self.failed(source))? {
                    let left = Duration::from_millis(found.expires.unwrap_or(0));
                    if let Some((own, address)) = pair(&found.element.key) {
                        all.insert((place, own, address), left);
                    }
                }
            }
        }
        Ok(all)
    }

    /// Whether the kernel still has an address.
    fn has(&mut self, place: Place, own: IpAddr, address: IpAddr) -> Result<bool> {
        let (family, set) = place.set(own);
        let element = Element::new(key(own, address));
        let found = self.nft.element(&self.table(family), &set, &element);
        Ok(found.map_err(|source| self.failed(source))?.is_some())
    }
}

impl Known {
    /// Where it belongs under a policy. One name that is allowed opens an address that others share with it; else, one
    /// that is denied closes it.
    fn wanted(&self, policy: &Policy) -> Option<Place> {
        if self.names.is_empty() {
            return self.place;
        }
        let said = |judgement| {
            let mut names = self.names.iter();
            names.any(|name| policy.domains.judge(name) == judgement)
        };
        if said(Judgement::Allowed) {
            Some(Place::Names)
        } else {
            said(Judgement::Denied).then_some(Place::Noname)
        }
    }
}

/// What of a policy decides about addresses beyond the host.
fn reach(policy: &Policy) -> impl PartialEq + use<'_> {
    (policy.egress, &policy.allow, &policy.deny, &policy.domains)
}

/// The machine's address of the family of another one.
fn own(machine: &Machine, address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => machine.ipv4.into(),
        IpAddr::V6(_) => machine.ipv6.into(),
    }
}

fn key(own: IpAddr, address: IpAddr) -> Vec<u8> {
    concatenated(&[&octets(own), &octets(address)])
}

fn pair(key: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let (own, address) = key.split_at_checked(key.len() / 2)?;
    let read = |bytes: &[u8]| -> Option<IpAddr> {
        let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
        v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
            .ok()
    };
    Some((read(own)?, read(address)?))
}
