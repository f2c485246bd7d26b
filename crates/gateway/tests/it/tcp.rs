//! Forwarded TCP ports.

use std::sync::Arc;
use std::time::Duration;

use hutch_gateway::DialError;
use hutch_gateway::limits::TcpLimits;
use hutch_gateway::tcp::{Forward, Forwarder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::town::{BOUND, Behind, Town, next, stage};

struct Lab {
    forwarder: Forwarder,
    town: Arc<Town>,
}

impl Lab {
    fn new(change: impl FnOnce(&mut TcpLimits)) -> Self {
        let mut limits = TcpLimits::default();
        change(&mut limits);
        let town = Arc::new(Town::default());
        Self {
            forwarder: Forwarder::new(town.clone(), limits),
            town,
        }
    }

    async fn forward(&self, name: &str, behind: Behind) -> Forward {
        self.town.build(name, behind);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.forwarder
            .forward(listener, &format!("mch-{name}"), 22)
            .unwrap()
    }
}

async fn connect(forward: &Forward) -> TcpStream {
    TcpStream::connect(forward.address()).await.unwrap()
}

async fn rest(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut rest = Vec::new();
    let read = tokio::time::timeout(BOUND, stream.read_to_end(&mut rest)).await;
    read.expect("it hangs").map(|_| rest)
}

#[tokio::test]
async fn each_way_ends_for_itself() {
    let lab = Lab::new(|_| {});
    let (listener, behind) = stage().await;
    let forward = lab.forward("web", behind).await;
    let mut client = connect(&forward).await;
    let mut guest = next(&listener).await.stream;
    assert_eq!(*lab.town.dialled.lock().unwrap(), [22]);
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut guest).await.unwrap(), b"question");
    guest.write_all(b"answer").await.unwrap();
    guest.shutdown().await.unwrap();
    assert_eq!(rest(&mut client).await.unwrap(), b"answer");
    // And with the guest first.
    let mut client = connect(&forward).await;
    let mut guest = next(&listener).await.stream;
    guest.write_all(b"banner").await.unwrap();
    guest.shutdown().await.unwrap();
    assert_eq!(rest(&mut client).await.unwrap(), b"banner");
    client.write_all(&vec![7; 1_000_000]).await.unwrap();
    client.shutdown().await.unwrap();
    assert!(rest(&mut guest).await.unwrap() == vec![7; 1_000_000]);
}

#[tokio::test]
async fn where_nothing_listens_the_connection_is_reset() {
    let lab = Lab::new(|_| {});
    for (name, error) in [("a", DialError::NothingListens), ("b", DialError::Stopped)] {
        let forward = lab.forward(name, Behind::Nothing(error)).await;
        let mut client = connect(&forward).await;
        assert!(rest(&mut client).await.is_err());
    }
}

#[tokio::test]
async fn a_machine_that_does_not_answer_in_time_is_given_up() {
    let lab = Lab::new(|limits| limits.dial = Duration::from_millis(50));
    let never = Behind::Asleep(Arc::default(), "127.0.0.1:1".parse().unwrap());
    let forward = lab.forward("web", never).await;
    assert!(rest(&mut connect(&forward).await).await.is_err());
}

#[tokio::test]
async fn a_connection_waits_for_a_machine_that_starts_and_only_so_many_do() {
    let lab = Lab::new(|limits| {
        limits.waiting = 3;
        limits.waiting_per_machine = 2;
    });
    let (listener, behind) = stage().await;
    let Behind::At(address) = behind.clone() else {
        unreachable!("a stage is a listener")
    };
    let starts = Arc::new(tokio::sync::Notify::new());
    let asleep = || Behind::Asleep(starts.clone(), address);
    let web = lab.forward("web", asleep()).await;
    let other = lab.forward("other", asleep()).await;
    let up = lab.forward("up", behind).await;
    let dialled = async |wanted: usize| {
        while lab.town.dialled.lock().unwrap().len() < wanted {
            tokio::task::yield_now().await;
        }
    };
    let mut waiting = vec![connect(&web).await, connect(&web).await];
    dialled(2).await;
    assert!(rest(&mut connect(&web).await).await.is_err());
    // Who waits takes nothing from machines that run, as long as there are places.
    let mut client = connect(&up).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(next(&listener).await.exactly(1).await, b"x");
    waiting.push(connect(&other).await);
    dialled(4).await;
    assert!(rest(&mut connect(&other).await).await.is_err());
    assert!(rest(&mut connect(&up).await).await.is_err());
    assert_eq!(lab.town.dialled.lock().unwrap().len(), 4);

    starts.notify_waiters();
    for mut client in waiting {
        client.write_all(b"hello").await.unwrap();
        assert_eq!(next(&listener).await.exactly(5).await, b"hello");
    }
}

#[tokio::test]
async fn a_machine_and_a_client_have_only_so_many_connections() {
    let lab = Lab::new(|limits| {
        limits.per_machine = 2;
        limits.per_client = 3;
    });
    let (listener, behind) = stage().await;
    let web = lab.forward("web", behind.clone()).await;
    let other = lab.forward("other", behind).await;
    let (first, _second) = (connect(&web).await, connect(&web).await);
    let mut guests = vec![next(&listener).await, next(&listener).await];
    assert!(rest(&mut connect(&web).await).await.is_err());
    let _third = connect(&other).await;
    guests.push(next(&listener).await);
    assert!(rest(&mut connect(&other).await).await.is_err());
    // One that ended makes room.
    drop(first);
    guests.remove(0).until_the_end().await;
    loop {
        let mut again = connect(&web).await;
        let mut byte = [0];
        tokio::select! {
            _ = next(&listener) => break,
            read = again.read(&mut byte) => assert!(!matches!(read, Ok(1..))),
        }
    }
}

#[tokio::test]
async fn beyond_the_total_connections_wait() {
    let lab = Lab::new(|limits| limits.total = 1);
    let (listener, behind) = stage().await;
    let forward = lab.forward("web", behind).await;
    let first = connect(&forward).await;
    let guest = next(&listener).await;
    let mut second = connect(&forward).await;
    second.write_all(b"x").await.unwrap();
    drop((first, guest));
    assert_eq!(next(&listener).await.exactly(1).await, b"x");
}

#[tokio::test]
async fn a_connection_on_which_nothing_moves_is_cut() {
    let lab = Lab::new(|limits| limits.idle = Duration::from_millis(300));
    let (listener, behind) = stage().await;
    let forward = lab.forward("web", behind).await;
    let mut client = connect(&forward).await;
    let mut guest = next(&listener).await;
    // What moves stays, however long.
    for _ in 0..10 {
        client.write_all(b"x").await.unwrap();
        assert_eq!(guest.exactly(1).await, b"x");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(rest(&mut client).await);
    assert_eq!(guest.until_the_end().await, b"");
}

#[tokio::test]
async fn closing_cuts_connections_and_frees_the_port() {
    let lab = Lab::new(|_| {});
    let (listener, behind) = stage().await;
    let forward = lab.forward("web", behind).await;
    let address = forward.address();
    let mut client = connect(&forward).await;
    let mut guest = next(&listener).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(guest.exactly(1).await, b"x");
    assert_eq!(forward.connections(), 1);
    forward.close().await;
    drop(rest(&mut client).await);
    assert_eq!(guest.until_the_end().await, b"");
    TcpListener::bind(address).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_connections_at_once_all_echo() {
    const CONNECTIONS: usize = 400;
    let lab = Lab::new(|limits| limits.per_client = CONNECTIONS);
    let (listener, behind) = stage().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await.unwrap();
                to.shutdown().await.unwrap();
            });
        }
    });
    let forward = lab.forward("web", behind).await;
    let mut all = Vec::new();
    for _ in 0..CONNECTIONS {
        all.push(connect(&forward).await);
    }
    for (n, client) in all.iter_mut().enumerate() {
        client
            .write_all(format!("hello {n}").as_bytes())
            .await
            .unwrap();
        client.shutdown().await.unwrap();
    }
    for (n, client) in all.iter_mut().enumerate() {
        assert_eq!(rest(client).await.unwrap(), format!("hello {n}").as_bytes());
    }
}
