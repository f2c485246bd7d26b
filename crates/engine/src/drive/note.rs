//! The steps that only record what was found.

use hutch_contract::machine::Exit;
use hutch_contract::record::{Observed, Wanted};
use tracing::warn;

use super::{Body, Driver};
use crate::{Error, plan};

impl Driver {
    pub(super) async fn note_stopped(
        &mut self,
        exit: Option<Exit>,
        generation: u64,
    ) -> Result<(), Error> {
        let noted = self
            .machine
            .cell
            .update(|record| {
                // A wish that came meanwhile is not fulfilled by this.
                let by_itself = plan::came_to_run(record)
                    && plan::is_up(record.wanted)
                    && record.generation == generation;
                record.observed = Observed::Stopped;
                if by_itself && !plan::comes_back(record, exit.as_ref()) {
                    record.wanted = Wanted::Stopped;
                }
                if exit.is_some() {
                    record.exit = exit;
                }
                if record.wanted == Wanted::Stopped {
                    record.served = record.generation;
                }
                Ok(())
            })
            .await?;
        self.comes_back = plan::is_up(noted.record.wanted);
        self.body = Body::None(None);
        Ok(())
    }

    pub(super) async fn note_restarting(&mut self) -> Result<(), Error> {
        self.machine
            .cell
            .update(|record| {
                record.observed = Observed::Stopped;
                record.restart = false;
                Ok(())
            })
            .await?;
        self.body = Body::None(None);
        Ok(())
    }

    pub(super) async fn note_unknown(&mut self) -> Result<(), Error> {
        let Body::Unproved(reason) = &self.body else {
            return Ok(());
        };
        warn!(machine = %self.machine.cell.id, reason, "cannot prove whose process it is");
        let observed = Observed::Unknown {
            reason: reason.clone(),
        };
        self.machine
            .cell
            .update(|record| {
                record.observed = observed;
                Ok(())
            })
            .await?;
        Ok(())
    }
}
