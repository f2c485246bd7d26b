//! The levels that machines are wanted at. Made durable here; what follows is the driver's.

use hutch_contract::machine::{Machine, Status};
use hutch_contract::record::{MachineRecord, Wanted};

use crate::access::{self, Access};
use crate::admission::{self, Host, Size};
use crate::engine;
use crate::lifetime;
use crate::machines::{Reserved, with_promises};
use crate::{Engine, Error, Principal, choose, plan};

impl Engine {
    /// Wants the machine to run. One that runs is no error.
    ///
    /// # Errors
    /// [`Error::WrongStatus`] while it is being deleted; what is short on the host.
    pub async fn start(&self, who: &Principal, reference: &str) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        let _memory = self.take_memory(&self.machine(who, reference)?)?;
        self.want(who, reference, "start", |record| {
            lifetime::renew(record, engine::now_ms());
            if record.wanted != Wanted::Running || plan::status(record) == Status::Failed {
                // Its guest may have been told to power off: that goes on, and then it is started.
                record.restart = record.wanted == Wanted::Stopped && plan::came_to_run(record);
                record.wanted = Wanted::Running;
                record.generation += 1;
            }
            Ok(())
        })
        .await
    }

    /// Wants the machine to keep its memory and not to execute. One that is on its way up comes to run first.
    ///
    /// # Errors
    /// [`Error::WrongStatus`] for one that is stopped or failed; a runtime that cannot do it.
    pub async fn pause(&self, who: &Principal, reference: &str) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        let runtime = self.machine(who, reference)?.runtime;
        if !self.shared.runtime(&runtime)?.capabilities().pause {
            let able = self.able(|runtime| runtime.capabilities().pause).await;
            return Err(choose::unable(&runtime, "pause machines", &able));
        }
        self.want(who, reference, "pause", |record| {
            match plan::status(record) {
                Status::Running | Status::Starting => {
                    record.wanted = Wanted::Paused;
                    record.generation += 1;
                }
                Status::Paused | Status::Pausing => {}
                status => return Err(Error::wrong_status(&record.name, status, "pause")),
            }
            Ok(())
        })
        .await
    }

    /// Wants a paused machine to go on. One that runs is no error.
    ///
    /// # Errors
    /// [`Error::WrongStatus`] for one that is stopped or failed.
    pub async fn resume(&self, who: &Principal, reference: &str) -> Result<Machine, Error> {
        self.want(who, reference, "resume", |record| {
            match plan::status(record) {
                Status::Paused | Status::Pausing => go_on(record),
                Status::Running | Status::Starting => {}
                status => return Err(Error::wrong_status(&record.name, status, "resume")),
            }
            Ok(())
        })
        .await
    }

    /// Wants the machine to stop: its guest is asked, then it is ended.
    ///
    /// # Errors
    /// [`Error::WrongStatus`] while it is being deleted.
    pub async fn stop(&self, who: &Principal, reference: &str) -> Result<Machine, Error> {
        self.want(who, reference, "stop", |record| {
            if record.wanted != Wanted::Stopped {
                record.wanted = Wanted::Stopped;
                record.restart = false;
                record.generation += 1;
            }
            Ok(())
        })
        .await
    }

    /// Wants the machine to stop and to run again.
    ///
    /// # Errors
    /// [`Error::WrongStatus`] while it is being deleted; what is short on the host for one that is stopped.
    pub async fn restart(&self, who: &Principal, reference: &str) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        let _memory = self.take_memory(&self.machine(who, reference)?)?;
        self.want(who, reference, "restart", |record| {
            lifetime::renew(record, engine::now_ms());
            record.wanted = Wanted::Running;
            record.restart = true;
            record.generation += 1;
            Ok(())
        })
        .await
    }

    /// Wants the machine gone, with its disk. Repeating it is no error while it is on its way out.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete(&self, who: &Principal, reference: &str) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        let machine = self.find_machine(who, reference)?;
        let current = machine
            .cell
            .update(|record| {
                if record.wanted != Wanted::Deleted {
                    record.wanted = Wanted::Deleted;
                    record.generation += 1;
                }
                Ok(())
            })
            .await?;
        Ok(self.shared.view(&current))
    }

    async fn want(
        &self,
        who: &Principal,
        reference: &str,
        verb: &'static str,
        change: impl FnOnce(&mut MachineRecord) -> Result<(), Error>,
    ) -> Result<Machine, Error> {
        access::check(who, Access::Write)?;
        let machine = self.find_machine(who, reference)?;
        let current = machine
            .cell
            .update(|record| {
                if record.wanted == Wanted::Deleted {
                    return Err(Error::wrong_status(
                        &record.name,
                        plan::status(record),
                        verb,
                    ));
                }
                change(record)
            })
            .await?;
        Ok(self.shared.view(&current))
    }

    /// Takes the memory of a machine that has none and is to run again.
    pub(crate) fn take_memory(&self, machine: &Machine) -> Result<Option<Reserved<'_>>, Error> {
        if !matches!(machine.status, Status::Stopped | Status::Failed) {
            return Ok(None);
        }
        let shared = self.shared.as_ref();
        let size = Size {
            vcpu: machine.vcpu,
            memory_mib: machine.memory_mib,
            disk_gib: machine.disk_gib,
        };
        let idle = Host::of(&shared.config.data_dir)?;
        let mut fleet = shared.fleet();
        let host = Host {
            machines: 0,
            ..with_promises(idle, &fleet)
        };
        admission::room(&shared.config, &host, &size)?;
        Ok(Some(Reserved::new(shared, &mut fleet, size.memory_mib)))
    }
}

/// Wants a machine that is paused, or about to be, to execute.
fn go_on(record: &mut MachineRecord) {
    lifetime::renew(record, engine::now_ms());
    record.wanted = Wanted::Running;
    record.generation += 1;
}

/// Lets a machine that is paused go on, for something that uses it.
pub(crate) async fn wake(machine: &engine::Machine) -> Result<(), Error> {
    let woken = machine.cell.update(|record| {
        // Somebody may have been faster.
        if plan::status(record) == Status::Paused {
            go_on(record);
        }
        Ok(())
    });
    woken.await.map(drop)
}
