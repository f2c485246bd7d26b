//! How machines are reached from outside: ports of the host and host labels, given and taken back, and what whoever
//! listens for us asks. Nothing here listens for long.

use std::net::{IpAddr, TcpListener};

use hutch_contract::expose::{
    Access as UrlAccess, ChangeMachine, Expose, Exposure, GivenPort, Port, PortState, PublishPort,
};
use hutch_contract::id::MachineId;
use hutch_contract::machine::{CreateMachine, Machine};
use hutch_contract::name::Name;
use hutch_contract::record::{FORMAT, MachineRecord, Wanted};
use hutch_store::{Check, Store, Write};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::access::{self, Access};
use crate::engine::{self, Shared};
use crate::ports::{Doors, Want};
use crate::rows::{self, Current};
use crate::{Engine, Error, Principal, deadline, hosts, keys, lifetime, plan, ports};

/// Looks at a port that somebody has just let go: a machine of ours that is gone since a moment ago.
const LET_GO_LOOKS: u32 = 20;

/// A port of the host that is to be listened on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Published {
    /// The port.
    pub host_port: u16,
    /// Address of the host.
    pub bind: IpAddr,
    /// The machine that it leads to.
    pub machine: MachineId,
    /// The port there.
    pub guest_port: u16,
}

/// A machine as HTTP reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// Its id.
    pub id: MachineId,
    /// Its starts: connections to it do not outlive one.
    pub starts: u32,
    /// The port behind its label.
    pub http_port: u16,
    /// Further ports.
    pub expose: Expose,
    /// Who may come in.
    pub access: UrlAccess,
    /// What tokens must be of.
    pub generation: u64,
}

/// What a token is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenFor {
    /// The machine that it opens.
    pub machine: MachineId,
    /// The generation that it is of.
    pub generation: u64,
    /// Where it is shown; none without a gateway.
    pub url: Option<String>,
}

/// The row of what tokens are made with.
#[derive(Serialize, Deserialize)]
struct SecretRow {
    format: u32,
    /// 32 bytes.
    secret: Vec<u8>,
}

/// The secret that URL tokens are made with: made at first start, the same ever after.
pub(crate) async fn secret(store: &dyn Store) -> Result<[u8; 32], Error> {
    let key = rows::gateway();
    if let Some(row) = store.get_json::<SecretRow>(&key).await? {
        rows::known_format(&key, row.value.format)?;
        if let Ok(secret) = row.value.secret.try_into() {
            return Ok(secret);
        }
        return Err(Error::invalid("meta/gateway", "is no secret of 32 bytes"));
    }
    let secret = keys::random_bytes::<32>();
    let row = SecretRow {
        format: FORMAT,
        secret: secret.to_vec(),
    };
    let checks = vec![Check::Absent(key.clone())];
    store.commit(checks, vec![Write::json(key, &row)?]).await?;
    Ok(secret)
}

/// What a machine is given before its record says so; it goes back unless that comes to pass.
pub(crate) struct Given<'a> {
    doors: &'a Doors,
    machine: MachineId,
    pub ports: Vec<GivenPort>,
    host: Option<String>,
    kept: bool,
}

impl<'a> Given<'a> {
    fn nothing(doors: &'a Doors, machine: &MachineId) -> Given<'a> {
        Given {
            doors,
            machine: machine.clone(),
            ports: Vec::new(),
            host: None,
            kept: false,
        }
    }

    async fn take_ports(&mut self, shared: &Shared, wants: &[Want]) -> Result<(), Error> {
        // Those that are named come first: else one that is chosen could take one of them.
        let (named, any): (Vec<_>, Vec<_>) = wants.iter().partition(|w| w.host_port.is_some());
        for want in named.into_iter().chain(any) {
            let mut looks = LET_GO_LOOKS;
            let given = loop {
                match self
                    .doors
                    .take(&self.machine, want, &shared.config.reach.ports)
                {
                    Err(Error::PortTaken { ours: false, .. }) if looks > 0 => looks -= 1,
                    outcome => break outcome?,
                }
                tokio::time::sleep(deadline::PORT_LET_GO / LET_GO_LOOKS).await;
            };
            self.ports.push(given);
        }
        Ok(())
    }

    /// The rows of what is given, for the commit of the record that has it.
    pub fn rows(&self) -> Result<(Vec<Check>, Vec<Write>), Error> {
        let ports = self.ports.iter().map(|port| rows::port(port.host_port));
        let keys: Vec<_> = ports.chain(self.host.as_deref().map(rows::host)).collect();
        let writes = keys
            .iter()
            .map(|key| Write::json(key.clone(), &self.machine));
        let writes = writes.collect::<Result<Vec<_>, _>>()?;
        Ok((keys.into_iter().map(Check::Absent).collect(), writes))
    }

    /// It is durable.
    pub fn keep(mut self) {
        self.kept = true;
        self.doors
            .keep(self.ports.iter().map(|port| port.host_port));
    }
}

impl Drop for Given<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.ports
                .iter()
                .for_each(|port| self.doors.free(&self.machine, port.host_port));
            if let Some(host) = &self.host {
                self.doors.free_host(host);
            }
        }
    }
}

impl Shared {
    /// Everything that a new machine is reached by, as it will stand in its record.
    pub async fn give<'a>(
        &'a self,
        who: &Principal,
        id: &MachineId,
        name: &Name,
        request: &CreateMachine,
    ) -> Result<(Exposure, Given<'a>), Error> {
        let mut exposure = ports::exposure(request)?;
        let wants = ports::wanted(who, &self.config.reach, request)?;
        let mut given = Given::nothing(&self.doors, id);
        given.take_ports(self, &wants).await?;
        given.host = self.doors.take_host(id, &hosts::candidates(name, id));
        exposure.ports.clone_from(&given.ports);
        exposure.host.clone_from(&given.host);
        Ok((exposure, given))
    }

    /// Adds to a machine as the API shows it how it is reached.
    pub fn show_ways(&self, record: &MachineRecord, machine: &mut Machine) {
        let exposure = &record.exposure;
        machine.http_port = Some(exposure.http_port);
        machine.expose = exposure.expose.clone();
        machine.access = Some(exposure.access);
        machine.ports = exposure
            .ports
            .iter()
            .map(|port| self.doors.show(port))
            .collect();
        let (Some(urls), Some(host)) = (&self.config.reach.urls, &exposure.host) else {
            return;
        };
        machine.url = Some(urls.of(host, None));
        if let Expose::Ports(ports) = &exposure.expose {
            let each = ports.iter().map(|port| (*port, urls.of(host, Some(*port))));
            machine.urls = each.collect();
        }
    }
}

impl Engine {
    /// Knows at start what machines are reached by, and gives labels to those of versions that gave none.
    pub(crate) async fn load_ways(&self) -> Result<(), Error> {
        let shared = &self.shared;
        let machines: Vec<_> = shared.fleet().machines.values().cloned().collect();
        let mut unlabelled = Vec::new();
        for machine in machines {
            let Some(current) = machine.cell.get() else {
                continue;
            };
            let exposure = &current.record.exposure;
            shared.doors.load(&machine.cell.id, exposure);
            if exposure.host.is_none() {
                unlabelled.push((machine, current));
            }
        }
        for (machine, current) in unlabelled {
            let record = &current.record;
            let labels = hosts::candidates(&record.name, &record.id);
            let mut given = Given::nothing(&shared.doors, &record.id);
            given.host = shared.doors.take_host(&record.id, &labels);
            let host = given.host.clone();
            let change = |record: &mut MachineRecord| {
                record.exposure.host = host;
                Ok(())
            };
            machine.cell.update_with(given.rows()?, change).await?;
            given.keep();
        }
        Ok(())
    }

    /// Changes how a machine is reached by HTTP, and when it rests or ends by itself, at once.
    ///
    /// # Errors
    /// What is wrong with the request; [`Error::WrongStatus`] while it is being deleted.
    pub async fn change(
        &self,
        who: &Principal,
        reference: &str,
        asked: &ChangeMachine,
    ) -> Result<Machine, Error> {
        let now_ms = self.shared.now_ms();
        self.change_record(who, reference, |record| {
            ports::change(&mut record.exposure, asked)?;
            if let Some(lifetime) = &asked.lifetime {
                // A runtime that is not there cannot pause either.
                let runtime = self.shared.runtimes.get(&record.runtime);
                let pauses = runtime.is_some_and(|runtime| runtime.capabilities().pause);
                record.lifetime = lifetime::changed(&record.lifetime, lifetime, pauses)?;
                if lifetime.ttl_s.is_some() {
                    record.expires_at_ms = lifetime::end_of(&record.lifetime, now_ms);
                }
            }
            Ok(())
        })
        .await
    }

    /// Makes every token worthless that was given out for a machine's URLs.
    ///
    /// # Errors
    /// As [`Engine::change`].
    pub async fn revoke_tokens(&self, who: &Principal, reference: &str) -> Result<(), Error> {
        self.change_record(who, reference, |record| {
            record.exposure.generation += 1;
            Ok(())
        })
        .await
        .map(drop)
    }

    async fn change_record(
        &self,
        who: &Principal,
        reference: &str,
        change: impl FnOnce(&mut MachineRecord) -> Result<(), Error>,
    ) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        let machine = self.find_machine(who, reference)?;
        let current = machine
            .cell
            .update(|record| {
                still_wanted(record, "change")?;
                change(record)
            })
            .await?;
        Ok(self.shared.view(&current))
    }

    /// What a token for a machine's URLs is made of, and the URL of the port that it is wanted for.
    ///
    /// # Errors
    /// [`Error::NotExposed`]; a token opens more than a key that may only read does.
    pub fn token_for(
        &self,
        who: &Principal,
        reference: &str,
        port: Option<u16>,
    ) -> Result<TokenFor, Error> {
        access::check(who, Access::Write)?;
        let record = self.current(who, reference)?.record;
        let exposure = &record.exposure;
        let named = port.filter(|port| *port != exposure.http_port);
        let exposed = named.is_none_or(|port| match &exposure.expose {
            Expose::All(_) => true,
            Expose::Ports(ports) => ports.contains(&port),
        });
        if !exposed {
            return Err(Error::NotExposed {
                name: record.name.to_string(),
                port: named.unwrap_or_default(),
            });
        }
        let urls = self.shared.config.reach.urls.as_ref();
        Ok(TokenFor {
            machine: record.id.clone(),
            generation: exposure.generation,
            url: urls
                .zip(exposure.host.as_ref())
                .map(|(urls, host)| urls.of(host, named)),
        })
    }

    /// The ports of the host that lead to a machine.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn ports(&self, who: &Principal, reference: &str) -> Result<Vec<Port>, Error> {
        let current = self.current(who, reference)?;
        let ports = current.record.exposure.ports.iter();
        Ok(ports.map(|port| self.shared.doors.show(port)).collect())
    }

    /// Gives a machine one more port of the host. One that it has already, just so, is no error.
    ///
    /// # Errors
    /// [`Error::PortTaken`]; what is wrong with the request; [`Error::WrongStatus`] while it is being deleted.
    pub async fn publish(
        &self,
        who: &Principal,
        reference: &str,
        asked: &PublishPort,
    ) -> Result<Port, Error> {
        access::check(who, Access::Write)?;
        let machine = self.find_machine(who, reference)?;
        let want = ports::want(who, &self.shared.config.reach, asked)?;
        let engine = self.clone();
        let publishing = async move { engine.publish_now(&machine, &want).await };
        self.unbroken("publish a port", publishing).await
    }

    async fn publish_now(&self, machine: &engine::Machine, want: &Want) -> Result<Port, Error> {
        let doors = &self.shared.doors;
        let current = machine.cell.get();
        let current = current.ok_or_else(|| Error::not_found("machine", &machine.name()))?;
        let has = current.record.exposure.ports.iter().find(|has| {
            want.host_port == Some(has.host_port)
                && (has.guest_port, has.bind) == (want.guest_port, want.bind)
        });
        if let Some(has) = has {
            return Ok(doors.show(has));
        }
        let mut given = Given::nothing(doors, &machine.cell.id);
        given.take_ports(&self.shared, &[*want]).await?;
        let port = given.ports[0].clone();
        let more = port.clone();
        let change = |record: &mut MachineRecord| {
            still_wanted(record, "get a port")?;
            ports::room(record.exposure.ports.len(), 1)?;
            record.exposure.ports.push(more);
            Ok(())
        };
        machine.cell.update_with(given.rows()?, change).await?;
        given.keep();
        Ok(doors.show(&port))
    }

    /// Takes a port of the host from a machine; connections through it are cut.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn unpublish(
        &self,
        who: &Principal,
        reference: &str,
        host_port: u16,
    ) -> Result<(), Error> {
        access::check(who, Access::Write)?;
        let machine = self.find_machine(who, reference)?;
        let engine = self.clone();
        let change = async move {
            let rows = (Vec::new(), vec![Write::Delete(rows::port(host_port))]);
            let take = |record: &mut MachineRecord| {
                let ports = &mut record.exposure.ports;
                let before = ports.len();
                ports.retain(|port| port.host_port != host_port);
                match ports.len() < before {
                    true => Ok(()),
                    false => Err(Error::not_found("port", &host_port.to_string())),
                }
            };
            machine.cell.update_with(rows, take).await?;
            engine.shared.doors.free(&machine.cell.id, host_port);
            Ok(())
        };
        self.unbroken("take a port back", change).await
    }

    fn current(&self, who: &Principal, reference: &str) -> Result<Current, Error> {
        let machine = self.find_machine(who, reference)?;
        let current = machine.cell.get();
        current.ok_or_else(|| Error::not_found("machine", reference))
    }

    /// The machine with this host label, as HTTP reaches it. Cheap, also for labels that nobody has.
    #[must_use]
    pub fn reached(&self, label: &str) -> Option<Reached> {
        let id = self.shared.doors.host(label)?;
        let machine = self.shared.fleet().machines.get(&id).cloned()?;
        let record = machine.cell.get()?.record;
        let exposure = &record.exposure;
        (record.wanted != Wanted::Deleted).then(|| Reached {
            id: record.id.clone(),
            starts: record.starts,
            http_port: exposure.http_port,
            expose: exposure.expose.clone(),
            access: exposure.access,
            generation: exposure.generation,
        })
    }

    /// What URL tokens are made with. For the gateway alone.
    #[must_use]
    pub fn gateway_secret(&self) -> [u8; 32] {
        self.shared.gateway_secret
    }

    /// All ports that are to be listened on.
    #[must_use]
    pub fn published(&self) -> Vec<Published> {
        self.shared.doors.published()
    }

    /// Changes whenever [`Engine::published`] does.
    #[must_use]
    pub fn published_changes(&self) -> watch::Receiver<u64> {
        self.shared.doors.changes()
    }

    /// The socket that was bound when the port was given; none when it was taken before, or by an earlier server.
    #[must_use]
    pub fn take_listener(&self, port: &Published) -> Option<TcpListener> {
        self.shared.doors.take_listener(port)
    }

    /// Notes whether a port is listened on, or why not: the API shows it.
    pub fn note_port(&self, port: &Published, listening: Result<(), String>) {
        let (state, reason) = match listening {
            Ok(()) => (PortState::Listening, None),
            Err(reason) => (PortState::Waiting, Some(reason)),
        };
        self.shared.doors.note(port, state, reason);
    }
}

fn still_wanted(record: &MachineRecord, verb: &'static str) -> Result<(), Error> {
    match record.wanted {
        Wanted::Deleted => Err(Error::wrong_status(
            &record.name,
            plan::status(record),
            verb,
        )),
        _ => Ok(()),
    }
}
