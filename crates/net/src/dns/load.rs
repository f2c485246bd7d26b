//! How much one machine may ask, and how long anything may take.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Labels that are remembered before idle ones are looked for.
const ROOM: usize = 64;

/// The resolver's limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Questions of all machines at once: each has a socket of its own.
    pub total: usize,
    /// Questions of one machine at once.
    pub in_flight: usize,
    /// Questions of one machine in a second, and at once after a while of silence.
    pub per_second: u32,
    /// Connections of one machine.
    pub connections: usize,
    /// For one of the host's resolvers to answer.
    pub server: Duration,
    /// From a question to its answer.
    pub deadline: Duration,
    /// Until a connection's next question has come, or its answer has gone.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            total: 1024,
            in_flight: 64,
            per_second: 200,
            connections: 4,
            server: Duration::from_secs(2),
            deadline: Duration::from_secs(5),
            idle: Duration::from_secs(10),
        }
    }
}

/// What machines are doing.
#[derive(Debug)]
pub(super) struct Load {
    limits: Limits,
    all: Arc<Mutex<All>>,
}

#[derive(Debug, Default)]
struct All {
    questions: usize,
    machines: HashMap<String, One>,
    /// Idle machines are looked for when there are so many.
    look_at: usize,
}

#[derive(Debug)]
struct One {
    questions: usize,
    connections: usize,
    left: f64,
    at: Instant,
}

/// A place that is given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    all: Arc<Mutex<All>>,
    label: String,
    question: bool,
}

impl Load {
    pub(super) fn new(limits: Limits) -> Self {
        let all = All {
            look_at: ROOM,
            ..All::default()
        };
        Self {
            limits,
            all: Arc::new(Mutex::new(all)),
        }
    }

    /// A place for a question, unless the machine asks too much.
    pub(super) fn question(&self, label: &str) -> Option<Place> {
        let mut all = self.lock();
        if all.questions >= self.limits.total {
            return None;
        }
        let per_second = f64::from(self.limits.per_second);
        let one = all.one(label, per_second);
        let now = Instant::now();
        let more = (now - one.at).as_secs_f64() * per_second;
        one.left = (one.left + more).min(per_second);
        one.at = now;
        if one.left < 1.0 || one.questions >= self.limits.in_flight {
            return None;
        }
        one.left -= 1.0;
        one.questions += 1;
        all.questions += 1;
        Some(self.place(label, true))
    }

    /// A place for a connection, unless the machine has too many.
    pub(super) fn connection(&self, label: &str) -> Option<Place> {
        let mut all = self.lock();
        let one = all.one(label, f64::from(self.limits.per_second));
        if one.connections >= self.limits.connections {
            return None;
        }
        one.connections += 1;
        Some(self.place(label, false))
    }

    fn place(&self, label: &str, question: bool) -> Place {
        Place {
            all: self.all.clone(),
            label: label.to_owned(),
            question,
        }
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    fn one(&mut self, label: &str, left: f64) -> &mut One {
        if self.machines.len() >= self.look_at && !self.machines.contains_key(label) {
            let idle = |one: &One| {
                let rested = one.at.elapsed() >= Duration::from_secs(1);
                one.questions == 0 && one.connections == 0 && rested
            };
            self.machines.retain(|_, one| !idle(one));
            self.look_at = (2 * self.machines.len()).max(ROOM);
        }
        self.machines
            .entry(label.to_owned())
            .or_insert_with(|| One {
                questions: 0,
                connections: 0,
                left,
                at: Instant::now(),
            })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if self.question {
            all.questions -= 1;
        }
        if let Some(one) = all.machines.get_mut(&self.label) {
            let count = if self.question {
                &mut one.questions
            } else {
                &mut one.connections
            };
            *count -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(limits: Limits) -> Load {
        Load::new(limits)
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_has_so_many_questions_at_once_and_others_do_not_mind() {
        let load = load(Limits {
            in_flight: 2,
            total: 4,
            ..Limits::default()
        });
        let [one, two] = [(); 2].map(|()| load.question("a").unwrap());
        assert!(load.question("a").is_none());
        let others = [(); 2].map(|()| load.question("b").unwrap());
        assert!(load.question("c").is_none());
        drop((one, others));
        assert!(load.question("a").is_some());
        drop(two);
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_has_so_many_questions_in_a_second() {
        let load = load(Limits {
            per_second: 10,
            ..Limits::default()
        });
        let asked = |load: &Load| (0..50).filter(|_| load.question("a").is_some()).count();
        assert_eq!(asked(&load), 10);
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(asked(&load), 5);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(asked(&load), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_machines_are_forgotten_and_busy_ones_are_not() {
        let load = load(Limits::default());
        let held = load.connection("busy").unwrap();
        for number in 0..10_000 {
            load.question(&format!("m{number}")).unwrap();
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        let all = load.lock().machines.len();
        assert!(all <= 2 * ROOM, "{all}");
        assert!(load.lock().machines.contains_key("busy"));
        drop(held);
    }
}
