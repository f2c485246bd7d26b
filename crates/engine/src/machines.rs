//! Requests about machines: admitted or refused, made durable, waited for. What follows is the driver's.

use std::sync::Arc;
use std::time::Duration;

use hutch_contract::id::{ImageId, MachineId, SnapshotId};
use hutch_contract::lifetime::Lifetime;
use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_contract::name::Name;
use hutch_contract::node::RuntimeInfo;
use hutch_contract::page::{MAX_LIMIT, Page};
use hutch_contract::record::{FORMAT, ImageRecord, MachineRecord, Observed, Wanted};
use hutch_runtime::Runtime;
use hutch_store::{Check, Write};
use serde::Serialize;

use crate::access::{self, Access};
use crate::admission::{self, Host, Size};
use crate::engine::{self, Engine, Fleet, Shared};
use crate::rows::{self, Current, IdempotencyRow, SlotRow};
use crate::{Error, Principal, choose, deadline, keys, lifetime, names, network, plan};

/// Attempts at a generated name that nobody has.
pub(crate) const NAME_ATTEMPTS: usize = 8;
/// Longest idempotency key in bytes.
const MAX_IDEMPOTENCY_KEY: usize = 255;

/// A create that was accepted.
#[derive(Debug, Clone)]
pub struct Admitted {
    /// The machine.
    pub machine: Machine,
    /// The same request had been accepted before: this is its answer again.
    pub replayed: bool,
}

/// Which machines to list.
#[derive(Debug, Clone, Default)]
pub struct ListMachines {
    /// Only those of this status.
    pub status: Option<Status>,
    /// `next` of the page before.
    pub cursor: Option<String>,
    /// Rows at most.
    pub limit: u32,
}

/// Memory that is promised until a record says so.
pub(crate) struct Reserved<'a> {
    shared: &'a Shared,
    memory_mib: u64,
}

impl<'a> Reserved<'a> {
    /// The caller has looked whether there is room, and has not let go of the fleet since.
    pub fn new(shared: &'a Shared, fleet: &mut Fleet, memory_mib: u32) -> Self {
        let memory_mib = u64::from(memory_mib);
        fleet.admitting_mib += memory_mib;
        Self { shared, memory_mib }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.shared.fleet().admitting_mib -= self.memory_mib;
    }
}

/// What a create holds until its machine is seen: its memory, and its slot, which goes back when it does not come to
/// pass.
struct SlotGuard<'a> {
    slot: u16,
    before: Option<SlotRow>,
    memory: Reserved<'a>,
    kept: bool,
}

impl Drop for SlotGuard<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let mut fleet = self.memory.shared.fleet();
            match self.before.take() {
                Some(row) => fleet.slots.insert(self.slot, row),
                None => fleet.slots.remove(&self.slot),
            };
        }
    }
}

/// What a new machine's disk, and perhaps its memory, come from.
#[derive(Clone)]
pub(crate) struct Base {
    pub image: ImageId,
    pub image_name: Name,
    /// The snapshot that it is a copy of.
    pub origin: Option<SnapshotId>,
    /// The snapshot after which its own come.
    pub head: Option<SnapshotId>,
    /// Likewise, where it goes on from its memory.
    pub resume_from: Option<SnapshotId>,
}

impl Base {
    fn of(image: &ImageRecord) -> Base {
        Base {
            image: image.id.clone(),
            image_name: image.name.clone(),
            origin: None,
            head: None,
            resume_from: None,
        }
    }
}

impl Engine {
    /// Makes a machine: returns once the intent is durable, long before it runs. Goes on when the future is dropped.
    ///
    /// # Errors
    /// What is wrong with the request, what is short on the host, or why no runtime can be used.
    pub async fn create(
        &self,
        who: &Principal,
        request: CreateMachine,
        idempotency_key: Option<&str>,
    ) -> Result<Admitted, Error> {
        let (engine, who) = (self.clone(), who.clone());
        let key = idempotency_key.map(str::to_owned);
        self.unbroken("create a machine", async move {
            engine.create_now(&who, request, key.as_deref()).await
        })
        .await
    }

    async fn create_now(
        &self,
        who: &Principal,
        mut request: CreateMachine,
        idempotency_key: Option<&str>,
    ) -> Result<Admitted, Error> {
        access::check(who, Access::Write)?;
        let idempotency = idempotency_key
            .map(|key| Idempotency::new(who, key, &request))
            .transpose()?;
        if let Some(idempotency) = &idempotency
            && let Some(machine) = self.replay(idempotency).await?
        {
            return Ok(Admitted {
                machine,
                replayed: true,
            });
        }
        let (image, _in_use) = self.use_image(who, &request.image)?;
        let size = admission::size(&request, image.size_bytes)?;
        admission::pairs("env", &request.env)?;
        admission::pairs("labels", &request.labels)?;
        let runtime = self.choose_runtime(request.runtime.as_deref()).await?;
        let kernel = request.kernel.as_deref();
        if runtime.boots_kernel() {
            self.shared.kernel.must_be_possible(kernel).await?;
        } else if kernel.is_some() {
            let able = self.able(|runtime| runtime.boots_kernel()).await;
            return Err(choose::unable(
                runtime.name(),
                "boot a kernel of choice",
                &able,
            ));
        }
        let pauses = runtime.capabilities().pause;
        request.lifetime = lifetime::changed(&Lifetime::default(), &request.lifetime, pauses)?;
        if request.snapshot_initial {
            self.can_snapshot(runtime.name(), false).await?;
        }
        network::check(&request.network)?;
        self.shared.must_hold(&request.network, runtime.name())?;
        for _ in 0..NAME_ATTEMPTS {
            let name = request.name.clone().unwrap_or_else(names::generate);
            match self
                .admit(
                    who,
                    &request,
                    name,
                    Base::of(&image),
                    size,
                    &runtime,
                    idempotency.as_ref(),
                )
                .await
            {
                Err(Error::NameTaken { .. }) if request.name.is_none() => continue,
                Err(error @ (Error::NameTaken { .. } | Error::PortTaken { .. })) => {
                    // It may be taken by the same request, sent twice at once.
                    if let Some(idempotency) = &idempotency
                        && let Some(machine) = self.replay(idempotency).await?
                    {
                        return Ok(Admitted {
                            machine,
                            replayed: true,
                        });
                    }
                    return Err(error);
                }
                outcome => return outcome,
            }
        }
        Err(Error::NameTaken {
            what: "machine",
            name: "every generated name".into(),
        })
    }

    /// Reserves everything the machine will use and its intent, in one commit.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a decision that was made before"
    )]
    pub(crate) async fn admit(
        &self,
        who: &Principal,
        request: &CreateMachine,
        name: Name,
        base: Base,
        size: Size,
        runtime: &Arc<dyn Runtime>,
        idempotency: Option<&Idempotency>,
    ) -> Result<Admitted, Error> {
        let shared = &self.shared;
        let id = MachineId::new();
        let mut slot = self.take_slot(&id, &size)?;
        let (exposure, ways) = shared.give(who, &id, &name, request).await?;
        let now_ms = shared.now_ms();
        let record = MachineRecord {
            format: FORMAT,
            id: id.clone(),
            owner: who.owner.clone(),
            name: name.clone(),
            slot: slot.slot,
            image: base.image,
            image_name: base.image_name,
            runtime: runtime.name().to_owned(),
            isolation: runtime.capabilities().isolation,
            kernel: request.kernel.clone(),
            vcpu: size.vcpu,
            memory_mib: size.memory_mib,
            disk_gib: size.disk_gib,
            env: request.env.clone(),
            labels: request.labels.clone(),
            network: request.network.clone(),
            lifetime: request.lifetime.clone(),
            expires_at_ms: lifetime::end_of(&request.lifetime, now_ms),
            wanted: Wanted::Running,
            observed: Observed::Absent,
            generation: 1,
            served: 0,
            restart: false,
            exit: None,
            starts: 0,
            failed_starts: 0,
            created_at_ms: now_ms,
            started_at_ms: None,
            unapplied: Vec::new(),
            timings: Vec::new(),
            exposure,
            work: None,
            origin: base.origin,
            head: base.head,
            snapshots: 0,
            resume_from: base.resume_from,
            keep_initial: request.snapshot_initial,
            cold: request.cold,
            warm: false,
        };
        let key = rows::machine(&id);
        let name_key = rows::machine_name(&who.owner, &name);
        let mut checks = vec![Check::Absent(key.clone()), Check::Absent(name_key.clone())];
        let mut writes = vec![
            Write::json(key, &record)?,
            Write::json(name_key.clone(), &id)?,
            Write::json(
                rows::slot(slot.slot),
                &SlotRow::Taken {
                    machine: id.clone(),
                },
            )?,
        ];
        let (free, taken) = ways.rows()?;
        checks.extend(free);
        writes.extend(taken);
        if let Some(idempotency) = idempotency {
            let row = IdempotencyRow {
                format: FORMAT,
                request_sha256: idempotency.request_sha256.clone(),
                reply: shared.view(&Current::new(record.clone(), 0)),
                created_at_ms: shared.now_ms(),
            };
            checks.push(Check::Absent(idempotency.row.clone()));
            writes.push(Write::json(idempotency.row.clone(), &row)?);
        }
        let revision = match shared.store.commit(checks, writes).await {
            Ok(revision) => revision,
            Err(hutch_store::Error::Conflict { key, .. }) if key == name_key => {
                return Err(Error::NameTaken {
                    what: "machine",
                    name: name.to_string(),
                });
            }
            Err(hutch_store::Error::Conflict { key, .. })
                if idempotency.is_some_and(|i| i.row == key) =>
            {
                let idempotency = idempotency.expect("it was just looked at");
                let machine = self
                    .replay(idempotency)
                    .await?
                    .ok_or(Error::IdempotencyMismatch)?;
                return Ok(Admitted {
                    machine,
                    replayed: true,
                });
            }
            Err(error) => return Err(error.into()),
        };
        slot.kept = true;
        ways.keep();
        let current = Current::new(record.clone(), revision.0);
        let reply = shared.view(&current);
        let machine = Arc::new(engine::Machine::new(shared.store.clone(), current));
        {
            let mut fleet = shared.fleet();
            fleet
                .machine_names
                .insert((who.owner.clone(), name), id.clone());
            fleet.machines.insert(id, machine.clone());
        }
        drop(slot);
        shared.drive(machine, &record, true)?;
        Ok(Admitted {
            machine: reply,
            replayed: false,
        })
    }

    /// Takes a slot and looks whether there is room, under one short lock, so that two creates cannot both have the
    /// last of it.
    fn take_slot(&self, id: &MachineId, size: &Size) -> Result<SlotGuard<'_>, Error> {
        let shared = self.shared.as_ref();
        let idle = Host::of(&shared.config.data_dir)?;
        let mut fleet = shared.fleet();
        admission::room(&shared.config, &with_promises(idle, &fleet), size)?;
        let last = shared.network().last_slot();
        let slot = admission::free_slot(&fleet.slots, last, shared.now_ms(), deadline::SLOT_REST);
        let slot = slot.ok_or(Error::Exhausted {
            what: "machines",
            need: 1,
            have: 0,
            unit: "slots",
        })?;
        let before = fleet.slots.insert(
            slot,
            SlotRow::Taken {
                machine: id.clone(),
            },
        );
        Ok(SlotGuard {
            slot,
            before,
            memory: Reserved::new(shared, &mut fleet, size.memory_mib),
            kept: false,
        })
    }

    /// What an earlier request with this key made.
    pub(crate) async fn replay(&self, idempotency: &Idempotency) -> Result<Option<Machine>, Error> {
        let Some(row) = self
            .shared
            .store
            .get_json::<IdempotencyRow>(&idempotency.row)
            .await?
        else {
            return Ok(None);
        };
        if row.value.request_sha256 != idempotency.request_sha256 {
            return Err(Error::IdempotencyMismatch);
        }
        let reply = row.value.reply;
        loop {
            let seen = self.shared.fleet().machines.get(&reply.id).cloned();
            if let Some(current) = seen.and_then(|machine| machine.cell.get()) {
                return Ok(Some(self.shared.view(&current)));
            }
            let key = rows::machine(&reply.id);
            if self.shared.store.get(&key).await?.is_none() {
                // It was deleted since.
                return Ok(Some(reply));
            }
            // The first request has been committed this instant, and is about to let its machine be seen.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Drops replies that are too old to be asked for again.
    pub(crate) async fn sweep_idempotency(&self) -> Result<(), Error> {
        let store = self.shared.store.as_ref();
        let oldest = self
            .shared
            .now_ms()
            .saturating_sub(deadline::IDEMPOTENCY.as_millis() as u64);
        for row in rows::all::<IdempotencyRow>(store, "idempotency/").await? {
            if row.value.created_at_ms < oldest {
                store
                    .commit(vec![row.unchanged()], vec![Write::Delete(row.key)])
                    .await?;
            }
        }
        Ok(())
    }

    async fn choose_runtime(&self, asked: Option<&str>) -> Result<Arc<dyn Runtime>, Error> {
        let shared = &self.shared;
        let allow_emulation = shared.config.allow_emulation;
        let Some(name) = asked.or(shared.config.runtime.as_deref()) else {
            let infos = self.runtimes().await;
            return shared.runtime(&choose::best(&infos, allow_emulation)?.name);
        };
        let runtime = shared.runtime(name)?;
        match choose::refusal(&runtime.probe().await, allow_emulation) {
            None => Ok(runtime),
            Some((reason, hint)) => Err(Error::RuntimeUnusable {
                name: runtime.name().to_owned(),
                reason,
                hint,
            }),
        }
    }

    /// The runtimes that can do something.
    pub(crate) async fn able(&self, can: impl Fn(&dyn Runtime) -> bool) -> Vec<RuntimeInfo> {
        let mut able = Vec::new();
        for runtime in self.shared.runtimes.iter() {
            if can(runtime.as_ref()) {
                able.push(runtime.probe().await);
            }
        }
        able
    }

    /// What there is to run machines with.
    pub async fn runtimes(&self) -> Vec<RuntimeInfo> {
        let mut infos = Vec::new();
        for runtime in self.shared.runtimes.iter() {
            infos.push(runtime.probe().await);
        }
        infos
    }

    /// One machine, by id or name.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn machine(&self, who: &Principal, reference: &str) -> Result<Machine, Error> {
        let machine = self.find_machine(who, reference)?;
        let current = machine
            .cell
            .get()
            .ok_or_else(|| Error::not_found("machine", reference))?;
        Ok(self.shared.view(&current))
    }

    /// Machines in pages, oldest first.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a cursor that no page gave.
    pub fn machines(&self, who: &Principal, list: &ListMachines) -> Result<Page<Machine>, Error> {
        let after = match &list.cursor {
            None => None,
            Some(cursor) => Some(
                cursor
                    .parse::<MachineId>()
                    .map_err(|_| Error::invalid("cursor", "is not of a list"))?,
            ),
        };
        let limit = page_limit(list.limit)?;
        let fleet = self.shared.fleet();
        let range = match &after {
            None => fleet.machines.range::<MachineId, _>(..),
            Some(id) => fleet
                .machines
                .range((std::ops::Bound::Excluded(id), std::ops::Bound::Unbounded)),
        };
        let mut found = range
            .filter_map(|(_, machine)| machine.cell.get())
            .filter(|current| access::sees(who, &current.record.owner))
            .filter(|current| {
                list.status
                    .is_none_or(|status| plan::status(&current.record) == status)
            })
            .map(|current| self.shared.view(&current));
        let items: Vec<_> = found.by_ref().take(limit).collect();
        let more = found.next().is_some();
        let next = more
            .then(|| items.last().map(|machine| machine.id.to_string()))
            .flatten();
        Ok(Page { items, next })
    }

    pub(crate) fn find_machine(
        &self,
        who: &Principal,
        reference: &str,
    ) -> Result<Arc<engine::Machine>, Error> {
        let fleet = self.shared.fleet();
        let id = match reference.parse::<MachineId>() {
            Ok(id) => Some(id),
            Err(_) => reference
                .parse::<Name>()
                .ok()
                .and_then(|name| fleet.machine_names.get(&(who.owner.clone(), name)).cloned()),
        };
        id.and_then(|id| fleet.machines.get(&id))
            .filter(|machine| {
                machine
                    .cell
                    .get()
                    .is_some_and(|current| access::sees(who, &current.record.owner))
            })
            .cloned()
            .ok_or_else(|| Error::not_found("machine", reference))
    }
}

impl Shared {
    /// A machine as the API shows it.
    pub(crate) fn view(&self, current: &Current) -> Machine {
        let runtime = self.runtimes.get(&current.record.runtime);
        let mut machine = Machine {
            capabilities: runtime.map(|runtime| runtime.capabilities()),
            network: Some(
                self.network()
                    .view(&current.record, runtime.map(AsRef::as_ref)),
            ),
            ..current.machine()
        };
        self.show_ways(&current.record, &mut machine);
        machine
    }
}

/// The host with what is promised to the machines that exist or are being admitted. One that is still being stopped has
/// its memory; one that is being deleted is killed at once.
pub(crate) fn with_promises(host: Host, fleet: &Fleet) -> Host {
    let taken = fleet
        .slots
        .values()
        .filter(|row| matches!(row, SlotRow::Taken { .. }))
        .count();
    let promised_mib: u64 = fleet
        .machines
        .values()
        .filter_map(|machine| machine.cell.get())
        .filter(|current| {
            let status = plan::status(&current.record);
            !matches!(status, Status::Stopped | Status::Failed | Status::Deleting)
        })
        .map(|current| u64::from(current.record.memory_mib))
        .sum();
    Host {
        machines: taken as u64,
        promised_mib: promised_mib + fleet.admitting_mib,
        ..host
    }
}

pub(crate) fn page_limit(limit: u32) -> Result<usize, Error> {
    if (1..=MAX_LIMIT).contains(&limit) {
        Ok(limit as usize)
    } else {
        Err(Error::invalid(
            "limit",
            format!("is {limit}, and must be from 1 to {MAX_LIMIT}"),
        ))
    }
}

/// A create's idempotency key and what it was sent with.
pub(crate) struct Idempotency {
    row: hutch_store::Key,
    request_sha256: String,
}

impl Idempotency {
    fn new(who: &Principal, key: &str, request: &impl Serialize) -> Result<Idempotency, Error> {
        if key.is_empty() || key.len() > MAX_IDEMPOTENCY_KEY {
            return Err(Error::invalid(
                "Idempotency-Key",
                format!("must have 1 to {MAX_IDEMPOTENCY_KEY} bytes"),
            ));
        }
        let body = serde_json::to_vec(request).expect("requests have string keys only");
        Ok(Idempotency {
            row: rows::idempotency(&who.owner, &keys::sha256_hex(key.as_bytes())),
            request_sha256: keys::sha256_hex(&body),
        })
    }

    /// One for each of the machines that a single request makes.
    pub fn each(
        who: &Principal,
        key: &str,
        request: &impl Serialize,
        count: usize,
    ) -> Result<Vec<Idempotency>, Error> {
        let Idempotency { request_sha256, .. } = Idempotency::new(who, key, request)?;
        // No key of anybody's has a NUL in it.
        let row = |number| {
            let key = format!("{key}\0{number}");
            rows::idempotency(&who.owner, &keys::sha256_hex(key.as_bytes()))
        };
        let one = |number| Idempotency {
            row: row(number),
            request_sha256: request_sha256.clone(),
        };
        Ok((0..count).map(one).collect())
    }
}
