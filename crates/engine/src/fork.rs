//! Copies of a machine: each begins as a snapshot of it, with an identity of its own.

use hutch_contract::id::SnapshotId;
use hutch_contract::machine::{CreateMachine, Machine};
use hutch_contract::name::Name;
use hutch_contract::record::SnapshotRecord;
use hutch_contract::snapshot::{CreateSnapshot, ForkMachine, MAX_FORK};

use crate::access::{self, Access};
use crate::admission::Size;
use crate::machines::{Base, Idempotency, NAME_ATTEMPTS};
use crate::{Engine, Error, Principal, deadline, names};

/// What became of a fork.
#[derive(Debug)]
pub struct Fork {
    /// How long what runs in the machine stood still for it, in microseconds.
    pub pause_us: Option<u64>,
    /// The copies, or why there is none.
    pub copies: Vec<Result<Machine, Error>>,
    /// All of them were made by an earlier request with this idempotency key.
    pub replayed: bool,
}

impl Engine {
    /// Makes copies of a machine, as it is now or was at one of its snapshots. Returns once each is as durable as after
    /// [`Engine::create`], or refused. Goes on when the future is dropped. Copies that an earlier request with the same
    /// idempotency key made are not made again; those that it did not come to are, of the machine as it is now.
    ///
    /// # Errors
    /// What is wrong with the request; why there can be no snapshot. What keeps a single copy from being made is told in
    /// its place.
    pub async fn fork(
        &self,
        who: &Principal,
        reference: &str,
        request: ForkMachine,
        idempotency_key: Option<&str>,
    ) -> Result<Fork, Error> {
        let (engine, who, reference) = (self.clone(), who.clone(), reference.to_owned());
        let key = idempotency_key.map(str::to_owned);
        self.unbroken("fork a machine", async move {
            engine
                .fork_now(&who, &reference, request, key.as_deref())
                .await
        })
        .await
    }

    async fn fork_now(
        &self,
        who: &Principal,
        reference: &str,
        request: ForkMachine,
        key: Option<&str>,
    ) -> Result<Fork, Error> {
        access::check(who, Access::Write)?;
        let names = names_of(&request)?;
        let machine = self.find_machine(who, reference)?;
        let idempotencies = match key {
            Some(key) => {
                let asked = (&machine.cell.id, &request);
                Idempotency::each(who, key, &asked, names.len())?
            }
            None => Vec::new(),
        };
        let mut made = Vec::new();
        for idempotency in &idempotencies {
            made.push(self.replay(idempotency).await?);
        }
        if !made.is_empty() && made.iter().all(Option::is_some) {
            return Ok(Fork {
                pause_us: None,
                copies: made.into_iter().flatten().map(Ok).collect(),
                replayed: true,
            });
        }
        let (snapshot, fresh) = match &request.snapshot {
            Some(named) => (
                self.find_snapshot(who, Some(&machine.cell.id), named)?.id,
                false,
            ),
            None => {
                let wanted = CreateSnapshot {
                    name: None,
                    memory: request.memory,
                };
                let begun = self.begin_snapshot(who, &machine, wanted, true).await?;
                if let Some(operation) = &begun.operation {
                    self.finish(who, operation, deadline::FORKED).await?;
                }
                (begun.id, true)
            }
        };
        let _in_use = self.shared.use_snapshot(&snapshot)?;
        let found = self.shared.fleet().snapshots.get(&snapshot).cloned();
        let found = found.ok_or_else(|| Error::not_found("snapshot", snapshot.as_str()))?;
        if request.memory && !found.memory {
            return Err(Error::invalid("memory", "is not in this snapshot"));
        }
        if request.memory {
            self.must_fit(&found).await?;
        }
        if !fresh {
            self.shared.verify_snapshot(&found).await?;
        }
        // What a copy is like besides its disk is as its parent is now.
        let parent = machine.cell.get();
        let parent = parent
            .ok_or_else(|| Error::not_found("machine", reference))?
            .record;
        let like = CreateMachine {
            image: found.image.to_string(),
            kernel: found.kernel.clone(),
            env: parent.env.clone(),
            labels: parent.labels.clone(),
            network: parent.network.clone(),
            lifetime: parent.lifetime.clone(),
            http_port: Some(parent.exposure.http_port).filter(|port| *port != 0),
            expose: parent.exposure.expose.clone(),
            access: parent.exposure.access,
            ..CreateMachine::default()
        };
        let mut copies = Vec::new();
        for (number, name) in names.into_iter().enumerate() {
            let idempotency = idempotencies.get(number);
            let copy = self.copy(who, &found, &like, name, request.memory, idempotency);
            copies.push(match made.get_mut(number).and_then(Option::take) {
                Some(copy) => Ok(copy),
                None => copy.await,
            });
        }
        Ok(Fork {
            pause_us: found.pause_us.filter(|_| fresh),
            copies,
            replayed: false,
        })
    }

    async fn copy(
        &self,
        who: &Principal,
        from: &SnapshotRecord,
        like: &CreateMachine,
        name: Option<Name>,
        memory: bool,
        idempotency: Option<&Idempotency>,
    ) -> Result<Machine, Error> {
        let runtime = self.shared.runtime(&from.runtime)?;
        let origin: SnapshotId = from.id.clone();
        let base = Base {
            image: from.image.clone(),
            image_name: from.image_name.clone(),
            origin: Some(origin.clone()),
            head: match from.passing {
                true => from.parent.clone(),
                false => Some(origin.clone()),
            },
            resume_from: memory.then_some(origin),
        };
        let size = Size {
            vcpu: from.vcpu,
            memory_mib: from.memory_mib,
            disk_gib: from.disk_gib,
        };
        for _ in 0..NAME_ATTEMPTS {
            let chosen = name.clone().unwrap_or_else(names::generate);
            let base = base.clone();
            let admitted = self.admit(who, like, chosen, base, size, &runtime, idempotency);
            match admitted.await {
                Err(Error::NameTaken { .. }) if name.is_none() => {}
                Err(error @ Error::NameTaken { .. }) => {
                    // It may be taken by the same request, sent twice at once.
                    let replayed = match idempotency {
                        Some(idempotency) => self.replay(idempotency).await?,
                        None => None,
                    };
                    return replayed.ok_or(error);
                }
                admitted => return Ok(admitted?.machine),
            }
        }
        Err(Error::NameTaken {
            what: "machine",
            name: "every generated name".into(),
        })
    }
}

/// One name per copy, where it has one already.
fn names_of(request: &ForkMachine) -> Result<Vec<Option<Name>>, Error> {
    let default = request.names.len().max(1) as u32;
    let count = request.count.unwrap_or(default);
    if !(1..=MAX_FORK).contains(&count) {
        return Err(Error::invalid(
            "count",
            format!("is {count}, and must be from 1 to {MAX_FORK}"),
        ));
    }
    if !request.names.is_empty() && request.names.len() != count as usize {
        let named = request.names.len();
        return Err(Error::invalid(
            "names",
            format!("are {named}, and not {count}"),
        ));
    }
    match &request.name_prefix {
        Some(_) if !request.names.is_empty() => {
            Err(Error::invalid("name_prefix", "makes no sense with `names`"))
        }
        Some(prefix) => (1..=count)
            .map(|number| {
                let name = format!("{prefix}-{number}").parse();
                let too_long = |_| Error::invalid("name_prefix", "is too long");
                name.map(Some).map_err(too_long)
            })
            .collect(),
        None if request.names.is_empty() => Ok(vec![None; count as usize]),
        None => Ok(request.names.iter().cloned().map(Some).collect()),
    }
}
