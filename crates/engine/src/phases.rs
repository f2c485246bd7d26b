//! The clock of a start: which phase began when and took how long.

use std::time::Instant;

use hutch_contract::machine::Timing;

/// How long each phase of a start takes.
#[derive(Default)]
pub(crate) struct Phases {
    origin: Option<Instant>,
    list: Vec<Timing>,
}

impl Phases {
    /// Starts a new list, unless one is going on.
    pub fn begin(&mut self) {
        if self.origin.is_none() {
            self.origin = Some(Instant::now());
            self.list.clear();
        }
    }

    pub fn phase(&mut self, phase: &str, started: Instant) {
        let Some(origin) = self.origin else { return };
        self.list.push(Timing {
            phase: phase.to_owned(),
            start_us: started.saturating_duration_since(origin).as_micros() as u64,
            took_us: started.elapsed().as_micros() as u64,
        });
    }

    pub fn list(&self) -> Vec<Timing> {
        self.list.clone()
    }

    pub fn end(&mut self) {
        self.origin = None;
    }
}
