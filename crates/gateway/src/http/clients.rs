//! The connections of clients: how many each may have, and which one goes when there are too many.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::head::Refusal;
use crate::limits::{Bucket, client, lock};

/// Requests of one connection that a client may give up at once, and then each second. Giving them up costs it nothing
/// and us a connection to the guest each.
const GIVEN_UP: (u32, u32) = (200, 20);

/// Milliseconds since some moment before the first call's.
pub(super) fn now_ms() -> u64 {
    static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = Instant::now().saturating_duration_since(*BEGINNING);
    // 0 is no time.
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX) + 1
}

/// All connections.
pub(super) struct Clients {
    total: usize,
    per_client: usize,
    next: AtomicU64,
    all: Mutex<BTreeMap<u64, Entry>>,
}

struct Entry {
    client: Option<IpAddr>,
    conn: std::sync::Weak<Conn>,
}

/// One connection. It is counted for as long as somebody holds it.
pub(super) struct Conn {
    id: u64,
    clients: Arc<Clients>,
    /// Ends it at once.
    pub(super) cut: CancellationToken,
    /// Whether what follows the last request's head may be no HTTP.
    pub(super) raw: AtomicBool,
    refusal: Mutex<Option<Refusal>>,
    busy: AtomicUsize,
    idle_since_ms: AtomicU64,
    given_up: Mutex<Bucket>,
    /// When it became the client's turn to take a piece of an answer, by request.
    turns: Mutex<HashMap<u64, u64>>,
}

impl Clients {
    pub(super) fn new(total: usize, per_client: usize) -> Arc<Self> {
        Arc::new(Self {
            total,
            per_client,
            next: AtomicU64::new(0),
            all: Mutex::default(),
        })
    }

    /// Takes in a connection, at the cost of the one that has been without a request for longest when there are too many.
    /// `None` when all of them have requests. Behind a proxy no address is known.
    pub(super) fn admit(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Arc<Conn>> {
        let address = address.map(client);
        let mut all = lock(&self.all);
        let same = |entry: &Entry| address.is_some() && entry.client == address;
        let crowded = all.values().filter(|entry| same(entry)).count() >= self.per_client;
        if crowded || all.len() >= self.total {
            let idle = all.iter().filter(|(_, entry)| !crowded || same(entry));
            let idle = idle.filter_map(|(id, entry)| {
                let conn = entry.conn.upgrade()?;
                let since = conn.idle_since_ms.load(Ordering::Relaxed);
                let idle = conn.busy.load(Ordering::Relaxed) == 0;
                // Handed out, so that it is not dropped, and locks, while we hold the lock.
                Some((idle.then_some((since, *id)), conn))
            });
            let idle: Vec<_> = idle.collect();
            let longest = idle
                .iter()
                .filter_map(|(key, conn)| Some(((*key)?, conn)))
                .min_by_key(|(key, _)| *key);
            let victim = longest.map(|((_, id), conn)| (id, conn.cut.clone()));
            if let Some((id, cut)) = &victim {
                all.remove(id);
                cut.cancel();
            }
            if victim.is_none() {
                drop(all);
                return None;
            }
            // Where the last holder is us, dropping needs the lock.
            drop(all);
            drop(idle);
            all = lock(&self.all);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let conn = Arc::new(Conn {
            id,
            clients: self.clone(),
            cut: CancellationToken::new(),
            raw: AtomicBool::new(false),
            refusal: Mutex::default(),
            busy: AtomicUsize::new(0),
            idle_since_ms: AtomicU64::new(now_ms()),
            given_up: Mutex::new(Bucket::new(GIVEN_UP.0, GIVEN_UP.1)),
            turns: Mutex::default(),
        });
        let entry = Entry {
            client: address,
            conn: Arc::downgrade(&conn),
        };
        all.insert(id, entry);
        Some(conn)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        lock(&self.all).len()
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        lock(&self.clients.all).remove(&self.id);
    }
}

impl Conn {
    /// Notes why the stand-in for a bad head is to be refused.
    pub(super) fn refuse(&self, refusal: Refusal) {
        *lock(&self.refusal) = Some(refusal);
    }

    pub(super) fn refusal(&self) -> Option<Refusal> {
        *lock(&self.refusal)
    }

    /// Begins a request.
    pub(super) fn begin(self: &Arc<Self>) -> Busy {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy {
            conn: self.clone(),
            request: self.clients.next.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Watches whether the client gives up on something before it is settled.
    pub(super) fn watch(self: &Arc<Self>) -> Watch {
        Watch {
            conn: self.clone(),
            settled: false,
        }
    }

    /// For how long it has been without a request.
    pub(super) fn idle(&self) -> Duration {
        if self.busy.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        let since = self.idle_since_ms.load(Ordering::Relaxed);
        Duration::from_millis(now_ms().saturating_sub(since))
    }

    /// Whether its client has left a piece of an answer lying for so long.
    pub(super) fn stalls(&self, limit: Duration) -> bool {
        let now = now_ms();
        let turns = lock(&self.turns);
        let mut since = turns.values().map(|since| now.saturating_sub(*since));
        since.any(|ms| Duration::from_millis(ms) > limit)
    }
}

/// A request that is being answered.
pub(super) struct Busy {
    pub(super) conn: Arc<Conn>,
    request: u64,
}

/// Dropped before it is settled, it counts as given up.
pub(super) struct Watch {
    conn: Arc<Conn>,
    settled: bool,
}

impl Watch {
    /// It came to its end.
    pub(super) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.settled && !lock(&self.conn.given_up).take() {
            self.conn.cut.cancel();
        }
    }
}

impl Busy {
    /// The client has a piece that it is to take.
    pub(super) fn clients_turn(&self) {
        lock(&self.conn.turns).insert(self.request, now_ms());
    }

    /// The client has taken all that there is.
    pub(super) fn guests_turn(&self) {
        lock(&self.conn.turns).remove(&self.request);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.guests_turn();
        self.conn.idle_since_ms.store(now_ms(), Ordering::Relaxed);
        self.conn.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([127, 0, 0, last]))
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_makes_room_and_the_busy_stay() {
        let clients = Clients::new(4, 2);
        let (a, b) = (
            clients.admit(address(1)).unwrap(),
            clients.admit(address(1)).unwrap(),
        );
        let busy = a.begin();
        tokio::time::advance(Duration::from_secs(1)).await;
        let c = clients.admit(address(1)).unwrap();
        assert!(b.cut.is_cancelled() && !a.cut.is_cancelled());
        let busy_too = c.begin();
        assert!(clients.admit(address(1)).is_none());
        // Others are not concerned, until there are too many in all.
        let d = clients.admit(address(2)).unwrap();
        let e = clients.admit(None).unwrap();
        let f = clients.admit(address(3)).unwrap();
        assert!(d.cut.is_cancelled() && !e.cut.is_cancelled());
        drop((busy, busy_too));
        drop((a, b, c, d, e, f));
        assert_eq!(clients.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_requests_all_the_time_is_cut() {
        let clients = Clients::new(4, 2);
        let conn = clients.admit(None).unwrap();
        for _ in 0..1000 {
            conn.watch().settle();
        }
        for _ in 0..200 {
            drop(conn.watch());
        }
        assert!(!conn.cut.is_cancelled());
        drop(conn.watch());
        assert!(conn.cut.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_stalls() {
        let clients = Clients::new(4, 2);
        let conn = clients.admit(None).unwrap();
        let (busy, other) = (conn.begin(), conn.begin());
        let limit = Duration::from_secs(30);
        busy.clients_turn();
        tokio::time::advance(limit).await;
        other.clients_turn();
        other.guests_turn();
        assert!(!conn.stalls(limit));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(conn.stalls(limit));
        busy.guests_turn();
        assert!(!conn.stalls(limit));
        assert_eq!(conn.idle(), Duration::ZERO);
        drop((busy, other));
        tokio::time::advance(limit).await;
        assert!(conn.idle() >= limit);
    }
}
