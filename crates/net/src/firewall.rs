//! The firewall of an instance in this network namespace: its tables, kept as they should be.

mod keep;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;

use hutch_contract::error::Kind;
use hutch_netlink::nft::{Batch, Element, Events, Family, Nft, RuleFound, Table};
use hutch_netlink::{Protocol, Socket, conntrack};

use rustix::io::Errno;

use crate::elements::{Elements, Machine, Policy, at_port, difference, elements, mark, padded};
use crate::rules::{self, Link, Rules, octets};

/// Why the firewall is not as it was to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused, or did not answer.
    #[error("cannot change the firewall {table}")]
    Kernel {
        /// The tables' name.
        table: String,
        /// What it said.
        #[source]
        source: hutch_netlink::Error,
    },
    /// Another process holds the tables.
    #[error("the firewall {table} belongs to another process")]
    Owned {
        /// The tables' name.
        table: String,
    },
    /// Others change nf_tables all the time.
    #[error("cannot bring the firewall {table} to rest, since others keep changing nf_tables")]
    Restless {
        /// The tables' name.
        table: String,
    },
    /// The rules would not know its tap.
    #[error("{label:?} is no name for a tap of this firewall")]
    Label {
        /// What was given.
        label: String,
    },
    /// Two machines would be one.
    #[error("the slot or an address of {label} is that of {other}")]
    Taken {
        /// Whose.
        label: String,
        /// Who has it.
        other: String,
    },
    /// Its questions to the resolver lead to no end of addresses.
    #[error("{label} has learned too many addresses of names")]
    Crowded {
        /// Which machine.
        label: String,
    },
    /// It has not been added.
    #[error("the firewall has no machine {label}")]
    Unknown {
        /// What was given.
        label: String,
    },
}

impl Error {
    /// What sort of failure it is.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Kernel { source, .. } => match source.errno() {
                Some(Errno::PERM | Errno::ACCESS) => Kind::Denied,
                // A kernel without nf_tables, or without a part of it.
                Some(Errno::OPNOTSUPP | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT) => {
                    Kind::Unavailable
                }
                _ => Kind::Bug,
            },
            Error::Owned { .. } | Error::Taken { .. } => Kind::Conflict,
            Error::Restless { .. } | Error::Crowded { .. } => Kind::Unavailable,
            Error::Label { .. } | Error::Unknown { .. } => Kind::Bug,
        }
    }
}

/// What every call here returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whether this process can have a firewall here, as far as a question tells.
///
/// # Errors
/// The kernel has no nf_tables, or does not let us.
pub fn probe() -> Result<()> {
    let asked = Nft::open().and_then(|mut nft| nft.generation());
    asked.map(drop).map_err(|source| Error::Kernel {
        table: "of machines".to_owned(),
        source,
    })
}

/// What an instance has of nf_tables here, whether a server keeps it or not: `FAMILY NAME` of each table.
///
/// # Errors
/// The kernel has no nf_tables, or does not let us.
pub fn inventory(tag: &str) -> Result<Vec<String>> {
    let found = Nft::open().and_then(|mut nft| tables(&mut nft, tag));
    let words = |table: Table| {
        let family = match table.family {
            Family::Inet => "inet",
            Family::Arp => "arp",
            Family::Bridge => "bridge",
        };
        format!("{family} {}", table.name)
    };
    match found {
        Ok(tables) => Ok(tables.into_iter().map(words).collect()),
        Err(source) => Err(refused(tag, source)),
    }
}

/// Removes the tables of an instance that has no machine and no server; returns whether there were any.
///
/// # Errors
/// The kernel refuses.
pub fn clear(tag: &str) -> Result<bool> {
    let cleared = Nft::open().and_then(|mut nft| {
        let tables = tables(&mut nft, tag)?;
        let mut batch = Batch::default();
        tables.iter().for_each(|table| batch.delete_table(table));
        nft.commit(&batch, None)?;
        Ok(!tables.is_empty())
    });
    cleared.map_err(|source| refused(tag, source))
}

fn tables(nft: &mut Nft, tag: &str) -> hutch_netlink::Result<Vec<Table>> {
    let mut all = Vec::new();
    for family in keep::FAMILIES {
        let name = rules::table(tag);
        let table = Table { family, name };
        if nft.table(&table)?.is_some() {
            all.push(table);
        }
    }
    Ok(all)
}

fn refused(tag: &str, source: hutch_netlink::Error) -> Error {
    Error::Kernel {
        table: rules::table(tag),
        source,
    }
}

/// What the firewalls of instances differ in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Names, addresses, networks.
    pub rules: Rules,
    /// For whoever finds the tables: whose they are. At most 64 bytes are kept.
    pub instance: String,
    /// The upper half of connections' marks; of no other instance on this host.
    pub number: NonZeroU16,
    /// Whether to hold the tables where the kernel can (6.9), so that nobody else changes them, and `flush ruleset`
    /// leaves them alone.
    pub own: bool,
}

impl Config {
    /// All that a machine is in the tables.
    fn elements(&self, machine: &Machine) -> Elements {
        let all = elements(machine, self.number);
        match self.rules.link {
            Link::Taps => all,
            Link::Bridge { .. } => at_port(all, machine),
        }
    }
}

/// What a machine sent, received, and lied, since it was added. IP packets with their headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Packets from the machine that passed for its own and were not beyond its rate.
    pub out_packets: u64,
    /// Bytes of these.
    pub out_bytes: u64,
    /// Packets to the machine that were not beyond its rate.
    pub in_packets: u64,
    /// Bytes of these.
    pub in_bytes: u64,
    /// Packets dropped since they lied about who sent them, or spoke for a router or DHCP server.
    pub spoofed_packets: u64,
}

/// What [`Firewall::verify`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verified {
    /// All was as it should be.
    Sound,
    /// Something was missing or changed, and has been made good.
    Repaired,
}

/// Tables, and who is in them. Blocking; a call takes about a millisecond.
///
/// Dropping it changes nothing: the rules stay, until the next one with the same tag takes them over.
#[derive(Debug)]
pub struct Firewall {
    config: Config,
    nft: Nft,
    conntrack: Socket,
    /// [`hutch_netlink::nft::OWNER`] and `PERSIST`, or none where the kernel cannot.
    flags: u32,
    /// Begins with the instance's name and ends with the rules' version.
    comment: String,
    machines: BTreeMap<String, Machine>,
    /// What the resolver told them.
    learned: names::Learned,
    /// nf_tables' generation at which all was seen to be as it should be.
    sound: Option<u32>,
    /// The rules as the kernel showed them when they had been made.
    rules: Vec<RuleFound>,
    /// What counters had shown before they were lost.
    base: BTreeMap<String, Counters>,
    last: BTreeMap<String, Counters>,
}

impl Firewall {
    /// Makes the tables, or takes over those that are there, with exactly these machines in them, in one transaction.
    ///
    /// Connections go on. Where the tables have the same version, counters do too.
    ///
    /// # Errors
    /// Two machines are alike, the kernel refuses, or another process holds the tables.
    pub fn open(config: Config, machines: Vec<Machine>) -> Result<Self> {
        let table = config.rules.table();
        let failed = |source| Error::Kernel {
            table: table.clone(),
            source,
        };
        let mut firewall = Self {
            nft: Nft::open().map_err(failed)?,
            conntrack: Socket::open(Protocol::Netfilter).map_err(failed)?,
            flags: keep::flags(config.own),
            comment: keep::comment(&config),
            config,
            machines: BTreeMap::new(),
            learned: names::Learned::default(),
            sound: None,
            rules: Vec::new(),
            base: BTreeMap::new(),
            last: BTreeMap::new(),
        };
        for machine in machines {
            firewall.check(&machine)?;
            firewall.machines.insert(machine.label.clone(), machine);
        }
        firewall.read_learned()?;
        firewall.rebuild()?;
        Ok(firewall)
    }

    /// Lets a machine's packets in: before its tap comes up. One of the same label is replaced.
    ///
    /// # Errors
    /// Its label, slot or addresses do not fit, or the kernel refuses. Nothing has changed then.
    pub fn add(&mut self, machine: Machine) -> Result<()> {
        self.check(&machine)?;
        self.swap(vec![(machine.label.clone(), Some(machine))])
    }

    /// Denies a machine everything, and forgets its connections: after its tap has gone down, and before its slot goes
    /// to another one. No machine has it as a peer then.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(&mut self, label: &str) -> Result<()> {
        let Some(machine) = self.machines.get(label).cloned() else {
            return Ok(());
        };
        let gone = [IpAddr::V4(machine.ipv4), IpAddr::V6(machine.ipv6)];
        let mut changes = vec![(label.to_owned(), None)];
        for other in self.machines.values() {
            if other.label != label && gone.iter().any(|ip| other.policy.allows_machine(*ip)) {
                let mut other = other.clone();
                other
                    .policy
                    .peers
                    .retain(|peer| peer.ipv4 != machine.ipv4 && peer.ipv6 != machine.ipv6);
                changes.push((other.label.clone(), Some(other)));
            }
        }
        self.swap(changes)?;
        self.base.remove(label);
        self.last.remove(label);
        self.forget_connections(machine.slot)
    }

    /// Forgets the connections of a slot: for one whose machine went while nobody looked.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget_connections(&mut self, slot: u16) -> Result<()> {
        let all = conntrack::delete_all(mark(self.config.number, slot));
        let done = self.conntrack.apply(&[all]);
        done.map_err(|source| self.failed(source))
    }

    /// Gives a machine another policy, which holds for the next packet, and ends the connections that it denies. What
    /// the machine has learned from the resolver is judged anew by its names; what it learned before this server
    /// started has none, and is forgotten.
    ///
    /// # Errors
    /// There is no such machine, or the kernel refuses.
    pub fn set_policy(&mut self, label: &str, policy: Policy) -> Result<()> {
        let mut machine = self.machine(label)?.clone();
        machine.policy = policy;
        self.swap(vec![(label.to_owned(), Some(machine))])?;
        self.cut(label)
    }

    /// What every machine sent and received.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn counters(&mut self) -> Result<BTreeMap<String, Counters>> {
        let mut counted = BTreeMap::new();
        for (family, set) in [
            (Family::Inet, "out4"),
            (Family::Inet, "out6"),
            (Family::Inet, "in4"),
            (Family::Inet, "in6"),
            (Family::Inet, "spoofed"),
            (Family::Arp, "spoofed"),
            (Family::Bridge, "spoofed"),
        ] {
            let table = self.table(family);
            let found = self
                .nft
                .elements(&table, set)
                .map_err(|source| self.failed(source))?;
            let found = found
                .into_iter()
                .filter_map(|found| Some((found.element.key, found.counted?)));
            counted.insert((family, set), found.collect::<BTreeMap<_, _>>());
        }
        let of = |family, set, key: &[u8]| {
            let there = counted.get(&(family, set)).and_then(|set| set.get(key));
            there.copied().unwrap_or_default()
        };
        let mut all = BTreeMap::new();
        for machine in self.machines.values() {
            let (v4, v6) = (octets(machine.ipv4.into()), octets(machine.ipv6.into()));
            let name = padded(&machine.label);
            let base = self.base.get(&machine.label).copied().unwrap_or_default();
            let sum = |set4, set6| {
                let one = of(Family::Inet, set4, &v4);
                let other = of(Family::Inet, set6, &v6);
                (one.0 + other.0, one.1 + other.1)
            };
            let (out, into) = (sum("out4", "out6"), sum("in4", "in6"));
            let spoofed = [Family::Inet, Family::Arp, Family::Bridge];
            let spoofed = spoofed.map(|family| of(family, "spoofed", &name).0);
            let counters = Counters {
                out_packets: base.out_packets + out.0,
                out_bytes: base.out_bytes + out.1,
                in_packets: base.in_packets + into.0,
                in_bytes: base.in_bytes + into.1,
                spoofed_packets: base.spoofed_packets + spoofed.iter().sum::<u64>(),
            };
            all.insert(machine.label.clone(), counters);
        }
        self.last.clone_from(&all);
        Ok(all)
    }

    /// Wakes whoever waits on it when somebody else changed the tables; then call [`Firewall::verify`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn events(&self) -> Result<Events> {
        let table = self.config.rules.table();
        let listen = self
            .nft
            .port()
            .and_then(|port| Events::listen(&table, port));
        listen.map_err(|source| self.failed(source))
    }

    /// Removes the tables, and with them all that machines may: whose taps are still there may everything then.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn destroy(&mut self) -> Result<()> {
        let mut batch = Batch::default();
        let tables = tables(&mut self.nft, &self.config.rules.tag);
        let tables = tables.map_err(|source| self.failed(source))?;
        tables.iter().for_each(|table| batch.delete_table(table));
        self.sound = None;
        self.machines.clear();
        self.learned = names::Learned::default();
        self.nft
            .commit(&batch, None)
            .map_err(|source| self.failed(source))
    }

    /// How the names of its taps begin.
    pub fn prefix(&self) -> String {
        self.config.rules.prefix()
    }

    /// Whether the kernel lets nobody else change the tables.
    pub fn is_owner(&self) -> bool {
        self.flags != 0
    }

    /// The machines in it, by label.
    pub fn machines(&self) -> &BTreeMap<String, Machine> {
        &self.machines
    }

    fn machine(&self, label: &str) -> Result<&Machine> {
        let label_of = || Error::Unknown {
            label: label.to_owned(),
        };
        self.machines.get(label).ok_or_else(label_of)
    }

    fn check(&self, machine: &Machine) -> Result<()> {
        let label = &machine.label;
        let fits = label.len() <= crate::MAX_INTERFACE_NAME
            && label.starts_with(&self.config.rules.prefix())
            && label.bytes().all(|byte| byte.is_ascii_graphic());
        if !fits {
            return Err(Error::Label {
                label: label.clone(),
            });
        }
        let on_one_link = self.config.rules.link != Link::Taps;
        let alike = |other: &&Machine| {
            other.label != *label
                && (other.slot == machine.slot
                    || other.ipv4 == machine.ipv4
                    || other.ipv6 == machine.ipv6
                    || on_one_link && other.mac == machine.mac
                    || on_one_link && other.link_local == machine.link_local)
        };
        match self.machines.values().find(alike) {
            Some(other) => Err(Error::Taken {
                label: label.clone(),
                other: other.label.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Changes machines in one transaction; where their elements are not what we remember, makes all anew.
    fn swap(&mut self, changes: Vec<(String, Option<Machine>)>) -> Result<()> {
        let of = |machine: Option<&Machine>| {
            machine.map_or_else(Elements::new, |machine| self.config.elements(machine))
        };
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for (label, machine) in &changes {
            let (old, wanted) = difference(&of(self.machines.get(label)), &of(machine.as_ref()));
            gone.push(old);
            new.push(wanted);
        }
        let (moves, known) = self.relearn(&changes)?;
        gone.push(moves.gone);
        new.push(moves.new);
        let mut batch = Batch::default();
        gone.iter()
            .for_each(|elements| self.delete(&mut batch, elements));
        new.iter()
            .for_each(|elements| self.insert(&mut batch, elements));
        let mut before = Vec::new();
        for (label, machine) in changes {
            before.push((label.clone(), self.replace(label, machine)));
        }
        let done = match self.nft.commit(&batch, None) {
            Ok(()) => self.changed_once(),
            // Refused since the tables are not what we remember, or unknown what became of it.
            Err(_) => self.rebuild(),
        };
        if done.is_err() {
            self.sound = None;
            for (label, machine) in before {
                self.replace(label, machine);
            }
            self.learned.restore(known);
        }
        done
    }

    /// Remembers a machine, or forgets one; returns what was remembered.
    fn replace(&mut self, label: String, machine: Option<Machine>) -> Option<Machine> {
        match machine {
            Some(machine) => self.machines.insert(label, machine),
            None => self.machines.remove(&label),
        }
    }

    fn delete(&self, batch: &mut Batch, elements: &Elements) {
        for ((family, set), elements) in elements {
            batch.delete(&self.table(*family), set, elements);
        }
    }

    fn insert(&self, batch: &mut Batch, elements: &Elements) {
        for ((family, set), elements) in elements {
            batch.add(&self.table(*family), set, elements);
        }
    }

    /// Ends connections that a machine's policy denies.
    fn cut(&mut self, label: &str) -> Result<()> {
        let machine = self.machine(label)?.clone();
        let own = [IpAddr::V4(machine.ipv4), IpAddr::V6(machine.ipv6)];
        let mark = mark(self.config.number, machine.slot);
        let all = conntrack::connections(&mut self.conntrack, mark);
        let all = all.map_err(|source| self.failed(source))?;
        let machines: BTreeSet<IpAddr> = self
            .machines
            .values()
            .flat_map(|machine| [IpAddr::V4(machine.ipv4), IpAddr::V6(machine.ipv6)])
            .collect();
        let gateway = IpAddr::V4(self.config.rules.gateway);
        let networks = &self.config.rules.host_networks;
        let denied = all.iter().filter(|connection| {
            let to = connection.destination;
            let port = connection.port.unwrap_or(0);
            let allowed = match machines.contains(&to) {
                true => machine.policy.allows_machine(to),
                false => {
                    let name = self.learned.judgement(label, to);
                    machine.policy.allows_by_name(to, name, networks)
                        && !machine.policy.forbids_port(to, port)
                }
            };
            own.contains(&connection.source) && to != gateway && !allowed
        });
        for connection in denied.collect::<Vec<_>>() {
            match self.conntrack.apply(&[conntrack::delete(connection)]) {
                // It has ended meanwhile.
                Err(error) if error.errno() == Some(rustix::io::Errno::NOENT) => {}
                other => other.map_err(|source| self.failed(source))?,
            }
        }
        Ok(())
    }

    fn table(&self, family: Family) -> Table {
        Table {
            family,
            name: self.config.rules.table(),
        }
    }

    fn failed(&self, source: hutch_netlink::Error) -> Error {
        Error::Kernel {
            table: self.config.rules.table(),
            source,
        }
    }
}

/// What is always in the sets, and what the machines bring.
fn wanted<'a>(
    config: &Config,
    machines: impl IntoIterator<Item = &'a Machine>,
) -> BTreeMap<(Family, String), BTreeSet<Element>> {
    let mut all = Elements::new();
    for table in config.rules.tables() {
        for (set, elements) in table.sets {
            all.insert(
                (table.table.family, set.name),
                elements.into_iter().collect(),
            );
        }
    }
    for machine in machines {
        for (place, elements) in config.elements(machine) {
            all.entry(place).or_default().extend(elements);
        }
    }
    all
}
