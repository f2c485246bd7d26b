//! How much of everything: places that are counted per key, and the numbers.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Places per key (a client, a machine), all of the same number.
#[derive(Debug)]
pub(crate) struct Places<K: Eq + Hash + Clone> {
    taken: Arc<Mutex<HashMap<K, usize>>>,
    limit: usize,
}

/// A place that is given back when dropped.
#[derive(Debug)]
pub(crate) struct Place<K: Eq + Hash + Clone> {
    taken: Arc<Mutex<HashMap<K, usize>>>,
    key: K,
}

impl<K: Eq + Hash + Clone> Places<K> {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            taken: Arc::default(),
            limit,
        }
    }

    /// A place of `key`, unless it has all of its own already.
    pub(crate) fn take(&self, key: &K) -> Option<Place<K>> {
        let mut taken = lock(&self.taken);
        let count = taken.entry(key.clone()).or_default();
        if *count >= self.limit {
            return None;
        }
        *count += 1;
        Some(Place {
            taken: self.taken.clone(),
            key: key.clone(),
        })
    }

    #[cfg(test)]
    fn keys(&self) -> usize {
        lock(&self.taken).len()
    }
}

impl<K: Eq + Hash + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        if let Some(count) = taken.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who a client is to our limits: an IPv4 address, or the /64 that one subscriber of IPv6 has.
pub(crate) fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) & (u128::MAX << 64);
            IpAddr::V6(Ipv6Addr::from(network))
        }
        address => address,
    }
}

/// So many at once, then so many a second.
#[derive(Debug)]
pub struct Bucket {
    left: f64,
    burst: f64,
    per_second: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    #[must_use]
    pub fn new(burst: u32, per_second: u32) -> Self {
        let burst = f64::from(burst);
        Self {
            left: burst,
            burst,
            per_second: f64::from(per_second),
            at: Instant::now(),
        }
    }

    /// Whether there was one left.
    pub fn take(&mut self) -> bool {
        let now = Instant::now();
        let more = (now - self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + more).min(self.burst);
        self.at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

/// How long a client waits for its machine when nobody says otherwise.
const DIAL: Duration = Duration::from_secs(30);

/// Limits of the TCP forwarder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpLimits {
    /// Connections at once, of all ports.
    pub total: usize,
    /// Of one machine.
    pub per_machine: usize,
    /// Of one client: an IPv4 address or an IPv6 /64.
    pub per_client: usize,
    /// Connections at once that wait for their machines, of all ports. One more is refused: machines that do not come up
    /// must not take all places.
    pub waiting: usize,
    /// Of one machine, likewise.
    pub waiting_per_machine: usize,
    /// From a client's connection until the machine's port has answered, starting and waking included.
    pub dial: Duration,
    /// A connection on which nothing moves for so long is cut.
    pub idle: Duration,
}

impl Default for TcpLimits {
    fn default() -> Self {
        Self {
            total: 4096,
            per_machine: 512,
            per_client: 256,
            waiting: 1024,
            waiting_per_machine: 256,
            dial: DIAL,
            idle: Duration::from_secs(3600),
        }
    }
}

/// Limits of the HTTP gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpLimits {
    /// Connections at once. One more takes the place of the one that has been without a request for longest.
    pub connections: usize,
    /// Connections of one client at once, likewise.
    pub per_client: usize,
    /// Requests of one client at once, which counts behind a proxy too.
    pub requests_per_client: usize,
    /// Requests of one machine at once.
    pub requests_per_machine: usize,
    /// Upgraded connections (WebSockets) of one machine at once.
    pub upgrades_per_machine: usize,
    /// Requests of one connection at once, over HTTP/2.
    pub streams: u32,
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// Header lines of a request.
    pub headers: usize,
    /// Until the whole head of a request has come, and how long a connection may wait for its next request.
    pub head: Duration,
    /// Without a byte of a request's body, or without the client taking a byte of the answer.
    pub stall: Duration,
    /// Until a port has answered, starting and waking the machine included.
    pub dial: Duration,
    /// From the last byte of a request until the head of the answer.
    pub answer: Duration,
    /// Between two bytes of an answer's body, or of a WebSocket.
    pub idle: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            per_client: 512,
            requests_per_client: 512,
            requests_per_machine: 256,
            upgrades_per_machine: 512,
            streams: 64,
            head_bytes: 32 * 1024,
            headers: 100,
            head: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            dial: DIAL,
            answer: Duration::from_secs(60),
            idle: Duration::from_secs(3600),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_per_key_and_leave_nothing_behind() {
        let places = Places::new(2);
        let (a, b) = (places.take(&'a').unwrap(), places.take(&'a').unwrap());
        assert!(places.take(&'a').is_none());
        let other = places.take(&'b').unwrap();
        drop(a);
        let again = places.take(&'a').unwrap();
        assert!(places.take(&'a').is_none());
        drop((again, b, other));
        assert_eq!(places.keys(), 0);
    }

    #[test]
    fn a_subscriber_is_one_client() {
        let of = |text: &str| client(text.parse().unwrap());
        assert_eq!(of("2001:db8::1:2:3:4"), of("2001:db8::ffff:0:0:1"));
        assert_ne!(of("2001:db8:0:1::1"), of("2001:db8:0:2::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_bucket_fills_slowly() {
        let mut bucket = Bucket::new(3, 2);
        assert_eq!((0..5).filter(|_| bucket.take()).count(), 3);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((0..5).filter(|_| bucket.take()).count(), 2);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!((0..9).filter(|_| bucket.take()).count(), 3);
    }
}
