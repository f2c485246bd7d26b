//! Ports of the host: what may be asked for, which one is given, and who has which.
//!
//! A port is taken in memory first, then bound, then committed together with its machine's record; whoever listens for
//! us gets the bound socket, so that nobody can have the port in between. A port that comes back needs no rest before it
//! is given again, as a slot does: connections to it are cut with the listener, and none can reach a later machine.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, TcpListener};
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hutch_contract::expose::{
    ChangeMachine, Expose, Exposure, GivenPort, MAX_EXPOSED, MAX_PORTS, Port, PortKind, PortState,
    PublishPort, SSH_PORT,
};
use hutch_contract::id::MachineId;
use hutch_contract::key::Scope;
use hutch_contract::machine::CreateMachine;
use tokio::sync::watch;

use crate::{Error, Principal, Published, Reach};

/// Ports below this are the administrator's.
const UNPRIVILEGED: u16 = 1024;

/// A port as it is asked for, with all that was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want {
    pub guest_port: u16,
    pub kind: PortKind,
    pub bind: IpAddr,
    /// The lowest free one when absent.
    pub host_port: Option<u16>,
}

/// The ports that a create asks for.
pub(crate) fn wanted(
    who: &Principal,
    reach: &Reach,
    request: &CreateMachine,
) -> Result<Vec<Want>, Error> {
    let ssh = Want {
        guest_port: SSH_PORT,
        kind: PortKind::Ssh,
        bind: reach.ports_bind,
        host_port: None,
    };
    let mut all: Vec<_> = request.ssh.then_some(ssh).into_iter().collect();
    for port in &request.ports {
        all.push(want(who, reach, port)?);
    }
    let fixed: Vec<_> = all.iter().filter_map(|want| want.host_port).collect();
    if fixed.iter().collect::<BTreeSet<_>>().len() < fixed.len() {
        return Err(Error::invalid("ports", "names a port of the host twice"));
    }
    room(0, all.len())?;
    Ok(all)
}

/// A port that is asked for, checked.
pub(crate) fn want(who: &Principal, reach: &Reach, asked: &PublishPort) -> Result<Want, Error> {
    let host_port = asked.host_port.filter(|port| *port != 0);
    let bind = asked.bind.unwrap_or(reach.ports_bind);
    let admin = who.scope == Scope::Admin;
    if asked.guest_port == 0 {
        return Err(Error::invalid("guest_port", "is 0; ports are 1 to 65535"));
    }
    if host_port.is_some_and(|port| port < UNPRIVILEGED) && !admin {
        let problem = "is below 1024, which needs an administrator's key";
        return Err(Error::invalid("host_port", problem));
    }
    // Others may not open more of the host than its administrator has.
    if bind != reach.ports_bind && !bind.is_loopback() && !admin {
        let problem =
            "is another address than the server's own, which needs an administrator's key";
        return Err(Error::invalid("bind", problem));
    }
    Ok(Want {
        guest_port: asked.guest_port,
        kind: PortKind::Tcp,
        bind,
        host_port,
    })
}

/// Whether a machine that has so many ports may have so many more.
pub(crate) fn room(has: usize, more: usize) -> Result<(), Error> {
    if has + more > MAX_PORTS {
        let problem = format!("are more than {MAX_PORTS} of one machine");
        return Err(Error::invalid("ports", problem));
    }
    Ok(())
}

/// How a new machine is reached by HTTP, without its label.
pub(crate) fn exposure(request: &CreateMachine) -> Result<Exposure, Error> {
    let mut exposure = Exposure::default();
    let asked = ChangeMachine {
        access: Some(request.access),
        http_port: request.http_port,
        expose: Some(request.expose.clone()),
        lifetime: None,
    };
    change(&mut exposure, &asked)?;
    exposure.generation = 0;
    Ok(exposure)
}

/// Changes how a machine is reached by HTTP.
pub(crate) fn change(exposure: &mut Exposure, asked: &ChangeMachine) -> Result<(), Error> {
    if let Some(port) = asked.http_port {
        if port == 0 {
            return Err(Error::invalid("http_port", "is 0; ports are 1 to 65535"));
        }
        exposure.http_port = port;
    }
    if let Some(expose) = &asked.expose {
        exposure.expose = match expose {
            Expose::All(_) => Expose::ALL,
            Expose::Ports(ports) => {
                let ports: BTreeSet<u16> = ports.iter().copied().collect();
                if ports.contains(&0) {
                    return Err(Error::invalid("expose", "has 0; ports are 1 to 65535"));
                }
                if ports.len() > MAX_EXPOSED {
                    let problem = format!("has more than {MAX_EXPOSED} ports; `all` is possible");
                    return Err(Error::invalid("expose", problem));
                }
                Expose::Ports(ports.into_iter().collect())
            }
        };
    }
    if let Some(access) = asked.access
        && access != exposure.access
    {
        exposure.access = access;
        exposure.generation += 1;
    }
    Ok(())
}

/// A port that a machine has, or is about to have.
struct Held {
    machine: MachineId,
    given: GivenPort,
    /// It is durable, and to be listened on.
    committed: bool,
    /// Bound when the port was given, until somebody takes it over.
    listener: Option<TcpListener>,
    /// Whether the kernel takes connections, as far as we were told.
    state: PortState,
    reason: Option<String>,
}

#[derive(Default)]
struct Tables {
    ports: BTreeMap<u16, Held>,
    hosts: HashMap<String, MachineId>,
}

/// Who has which port and which host label. Its lock may be taken under that of the fleet, never the other way round.
#[derive(Default)]
pub(crate) struct Doors {
    tables: Mutex<Tables>,
    /// Counts changes of what is to be listened on.
    changed: watch::Sender<u64>,
}

impl Doors {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Every change is a single insertion or removal: a panic elsewhere leaves it whole.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Takes and binds one port. [`Doors::free`] gives it back.
    pub fn take(
        &self,
        machine: &MachineId,
        want: &Want,
        range: &RangeInclusive<u16>,
    ) -> Result<GivenPort, Error> {
        let mut from = *range.start();
        loop {
            let port = match want.host_port {
                Some(port) => port,
                None => lowest_free(&self.tables().ports, from..=*range.end())?,
            };
            let given = GivenPort {
                host_port: port,
                guest_port: want.guest_port,
                kind: want.kind,
                bind: want.bind,
            };
            if let Err(ours) = self.reserve(machine, &given) {
                match want.host_port {
                    Some(port) => return Err(Error::PortTaken { port, ours }),
                    None => continue,
                }
            }
            match bind(&given) {
                Ok(listener) => {
                    if let Some(held) = self.tables().ports.get_mut(&port) {
                        held.listener = Some(listener);
                        held.state = PortState::Listening;
                    }
                    return Ok(given);
                }
                Err(error) => {
                    self.free(machine, port);
                    let taken = matches!(
                        error.kind(),
                        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied
                    );
                    match want.host_port {
                        _ if error.kind() == io::ErrorKind::AddrNotAvailable => {
                            return Err(Error::invalid("bind", "is no address of this host"));
                        }
                        Some(port) if error.kind() == io::ErrorKind::AddrInUse => {
                            return Err(Error::PortTaken { port, ours: false });
                        }
                        None if taken && port < *range.end() => from = port + 1,
                        None if taken => return Err(none_left()),
                        _ => {
                            return Err(Error::PortRefused {
                                port,
                                source: error,
                            });
                        }
                    }
                }
            }
        }
    }

    /// Fails with whether whoever has it has it for good.
    fn reserve(&self, machine: &MachineId, given: &GivenPort) -> Result<(), bool> {
        let mut tables = self.tables();
        if let Some(held) = tables.ports.get(&given.host_port) {
            return Err(held.committed);
        }
        let held = Held::new(machine, given, false);
        tables.ports.insert(given.host_port, held);
        Ok(())
    }

    /// Gives a port back, unless it is another machine's by now; what was bound is closed.
    pub fn free(&self, machine: &MachineId, port: u16) {
        let mut tables = self.tables();
        if tables
            .ports
            .get(&port)
            .is_some_and(|held| held.machine == *machine)
        {
            tables.ports.remove(&port);
        }
        drop(tables);
        self.tell();
    }

    /// It is durable: now it may be listened on.
    pub fn keep(&self, ports: impl IntoIterator<Item = u16>) {
        for port in ports {
            if let Some(held) = self.tables().ports.get_mut(&port) {
                held.committed = true;
            }
        }
        self.tell();
    }

    /// Takes the first of these labels that nobody has.
    pub fn take_host(&self, machine: &MachineId, labels: &[String]) -> Option<String> {
        let mut tables = self.tables();
        let free = |label: &&String| !tables.hosts.contains_key(*label);
        let label = labels.iter().find(free)?;
        tables.hosts.insert(label.clone(), machine.clone());
        Some(label.clone())
    }

    pub fn free_host(&self, label: &str) {
        self.tables().hosts.remove(label);
    }

    /// Whose label it is.
    pub fn host(&self, label: &str) -> Option<MachineId> {
        self.tables().hosts.get(label).cloned()
    }

    /// Knows what a record says.
    pub fn load(&self, machine: &MachineId, exposure: &Exposure) {
        let mut tables = self.tables();
        if let Some(host) = &exposure.host {
            tables.hosts.insert(host.clone(), machine.clone());
        }
        for given in &exposure.ports {
            let held = Held::new(machine, given, true);
            tables.ports.insert(given.host_port, held);
        }
    }

    /// Forgets a machine that is gone.
    pub fn forget(&self, machine: &MachineId) {
        {
            let mut tables = self.tables();
            tables.ports.retain(|_, held| held.machine != *machine);
            tables.hosts.retain(|_, id| id != machine);
        }
        self.tell();
    }

    /// A port as the API shows it.
    pub fn show(&self, given: &GivenPort) -> Port {
        let tables = self.tables();
        let held = tables.ports.get(&given.host_port);
        Port {
            host_port: given.host_port,
            guest_port: given.guest_port,
            kind: given.kind,
            bind: given.bind,
            state: held.map_or(PortState::Waiting, |held| held.state),
            reason: held.and_then(|held| held.reason.clone()),
        }
    }

    pub fn published(&self) -> Vec<Published> {
        let tables = self.tables();
        let committed = tables.ports.values().filter(|held| held.committed);
        committed
            .map(|held| Published {
                host_port: held.given.host_port,
                bind: held.given.bind,
                machine: held.machine.clone(),
                guest_port: held.given.guest_port,
            })
            .collect()
    }

    pub fn take_listener(&self, port: &Published) -> Option<TcpListener> {
        let mut tables = self.tables();
        tables.of(port)?.listener.take()
    }

    pub fn note(&self, port: &Published, state: PortState, reason: Option<String>) {
        if let Some(held) = self.tables().of(port) {
            held.state = state;
            held.reason = reason;
        }
    }
}

impl Held {
    fn new(machine: &MachineId, given: &GivenPort, committed: bool) -> Held {
        Held {
            machine: machine.clone(),
            given: given.clone(),
            committed,
            listener: None,
            state: PortState::Waiting,
            reason: None,
        }
    }
}

impl Tables {
    /// The port, unless it is another machine's by now.
    fn of(&mut self, port: &Published) -> Option<&mut Held> {
        let held = self.ports.get_mut(&port.host_port)?;
        (held.machine == port.machine).then_some(held)
    }
}

/// The lowest port of the range that nobody has.
fn lowest_free<T>(taken: &BTreeMap<u16, T>, range: RangeInclusive<u16>) -> Result<u16, Error> {
    let mut next = *range.start();
    for port in taken.range(range.clone()).map(|(port, _)| *port) {
        if port > next {
            break;
        }
        next = match port.checked_add(1) {
            Some(next) => next,
            None => return Err(none_left()),
        };
    }
    match range.contains(&next) {
        true => Ok(next),
        false => Err(none_left()),
    }
}

fn none_left() -> Error {
    Error::Exhausted {
        what: "ports",
        need: 1,
        have: 0,
        unit: "ports",
    }
}

/// Listens, so that nobody else can: `bind` alone would let another bind there too (SO_REUSEADDR, socket(7)).
fn bind(given: &GivenPort) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((given.bind, given.host_port))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
mod tests;
