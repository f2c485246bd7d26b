//! Clients that take much and give little: others do not notice them.

use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::town::{Answer, BOUND, Lab, Recorder, next, stage};

#[tokio::test]
async fn slow_clients_do_not_keep_others_out() {
    // There is place for fewer than come, and all come from one address.
    let lab = Lab::with(|limits| {
        limits.connections = 150;
        limits.per_client = 100;
    })
    .await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let mut slow = Vec::new();
    for n in 0..200 {
        let mut client = lab.client().await;
        // Some of the head, nothing at all, half of HTTP/2's, half of a body.
        client
            .send(match n % 4 {
                0 => "GET / HTTP/1.1\r\nHost: web.v",
                1 => "",
                2 => "PRI * HTTP/2.0\r\n",
                _ => "GET / HTTP/1.1\r\nHost: web.vms.test\r\n\r\nGET",
            })
            .await;
        slow.push(client);
        if n % 10 == 0 {
            let path = format!("/{n}");
            let answer = lab.get("web.vms.test", &path, "").await;
            assert_eq!((answer.status, answer.text()), (200, &path[..]));
        }
    }
}

#[tokio::test]
async fn slow_clients_are_ended() {
    let lab = Lab::with(|limits| limits.head = std::time::Duration::from_millis(200)).await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    for begun in ["", "P", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nHost:"] {
        let mut client = lab.client().await;
        client.send(begun).await;
        client.until_the_end().await;
    }
    // Also between two requests.
    let mut client = lab.client().await;
    assert_eq!(client.get("web.vms.test", "/", "").await.status, 200);
    assert_eq!(client.until_the_end().await, b"");
}

#[tokio::test]
async fn a_client_that_takes_no_answer_is_ended() {
    let lab = Lab::with(|limits| limits.stall = std::time::Duration::from_millis(300)).await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    client
        .send("GET / HTTP/1.1\r\nHost: web.vms.test\r\n\r\n")
        .await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    guest
        .send("HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
        .await;
    let piece = vec![0; 64 * 1024];
    // The client reads nothing: what the guest sends stops somewhere, then all of it ends.
    let sending = async {
        while tokio::io::AsyncWriteExt::write_all(&mut guest.stream, &piece)
            .await
            .is_ok()
        {}
    };
    tokio::time::timeout(BOUND, sending)
        .await
        .expect("it is never ended");
}

#[tokio::test]
async fn requests_of_one_machine_are_counted_and_others_go_on() {
    let lab = Lab::with(|limits| limits.requests_per_machine = 3).await;
    let recorder = Recorder::start().await;
    lab.town.build("other", recorder.behind());
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut client = lab.client().await;
        client
            .send("GET / HTTP/1.1\r\nHost: web.vms.test\r\n\r\n")
            .await;
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        waiting.push((client, guest));
    }
    let busy = lab.get("web.vms.test", "/", "").await;
    assert_eq!((busy.status, busy.header("retry-after")), (503, Some("1")));
    assert_eq!(lab.get("other.vms.test", "/", "").await.status, 200);
    let (mut client, mut guest) = waiting.pop().unwrap();
    guest.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.status, 204);
}

#[tokio::test]
async fn requests_of_one_client_are_counted() {
    let lab = Lab::with(|limits| limits.requests_per_client = 1).await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut client = lab.client().await;
    client
        .send("GET / HTTP/1.1\r\nHost: web.vms.test\r\n\r\n")
        .await;
    let mut guest = next(&listener).await;
    guest.head().await.unwrap();
    assert_eq!(lab.get("web.vms.test", "/", "").await.status, 429);
    guest.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.status, 204);
}

type H2 = http2::SendRequest<Empty<Bytes>>;

async fn h2(lab: &Lab) -> H2 {
    let stream = TcpStream::connect(lab.address).await.unwrap();
    let builder = http2::Builder::new(TokioExecutor::new());
    let (requests, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    requests
}

fn request(uri: &str) -> http::Request<Empty<Bytes>> {
    let request = http::Request::get(uri).header("cookie", "a=1");
    request.header("cookie", "b=2").body(Empty::new()).unwrap()
}

async fn answer(requests: &mut H2, uri: &str) -> Answer {
    let response = requests.send_request(request(uri)).await.unwrap();
    let status = response.status().as_u16();
    let head = format!("{:?}", response.headers());
    let body = http_body_util::BodyExt::collect(response.into_body()).await;
    Answer {
        status,
        head,
        body: body.unwrap().to_bytes().to_vec(),
    }
}

#[tokio::test]
async fn http2_reaches_the_same_machines() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build("web", recorder.behind());
    let mut requests = h2(&lab).await;
    let all = (0..50).map(|n| {
        let mut requests = requests.clone();
        async move { answer(&mut requests, &format!("http://3000-web.vms.test/{n}")).await }
    });
    for (n, all) in futures_join(all).await.into_iter().enumerate() {
        assert_eq!((all.status, all.text()), (200, &format!("/{n}")[..]));
    }
    let head = recorder.last().head;
    assert!(
        head.starts_with("GET /") && head.contains("cookie: a=1; b=2\r\n"),
        "{head}"
    );
    assert_eq!(
        crate::town::header(&head, "host"),
        Some("3000-web.vms.test")
    );
    assert_eq!(
        answer(&mut requests, "http://nobody.vms.test/")
            .await
            .status,
        404
    );
    let mut two = request("http://web.vms.test/");
    two.headers_mut()
        .insert("host", "other.vms.test".parse().unwrap());
    assert_eq!(requests.send_request(two).await.unwrap().status(), 400);
}

async fn futures_join<F: Future<Output = Answer> + Send + 'static>(
    all: impl Iterator<Item = F>,
) -> Vec<Answer> {
    let tasks: Vec<_> = all.map(tokio::spawn).collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap());
    }
    answers
}

#[tokio::test]
async fn a_client_that_takes_back_its_requests_is_cut_off() {
    let lab = Lab::new().await;
    let recorder = Recorder::start().await;
    lab.town.build("other", recorder.behind());
    // Answers never come, so every request is taken back before its own.
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(next(&listener).await);
        }
    });
    let mut requests = h2(&lab).await;
    let mut sent = 0;
    let flooding = async {
        while requests.ready().await.is_ok() {
            let asked = requests.send_request(request("http://web.vms.test/"));
            // Long enough for it to be on its way.
            drop(tokio::time::timeout(std::time::Duration::from_millis(1), asked).await);
            sent += 1;
        }
    };
    tokio::time::timeout(BOUND, flooding)
        .await
        .expect("it is never cut off");
    println!("cut off after {sent} requests");
    assert_eq!(lab.get("other.vms.test", "/", "").await.status, 200);
    let mut again = h2(&lab).await;
    assert_eq!(
        answer(&mut again, "http://other.vms.test/").await.status,
        200
    );
}

#[tokio::test]
async fn an_http2_client_that_takes_no_answer_is_ended() {
    let lab = Lab::with(|limits| limits.stall = std::time::Duration::from_millis(300)).await;
    let (listener, behind) = stage().await;
    lab.town.build("web", behind);
    let mut requests = h2(&lab).await;
    let asked = requests.send_request(request("http://web.vms.test/"));
    let playing = async {
        let mut guest = next(&listener).await;
        guest.head().await.unwrap();
        guest
            .send("HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
            .await;
        guest
    };
    let (response, mut guest) = tokio::join!(asked, playing);
    // Held and not read: its window stays shut while the connection itself lives.
    let _held = response.unwrap();
    let piece = vec![0; 64 * 1024];
    let sending = async {
        while tokio::io::AsyncWriteExt::write_all(&mut guest.stream, &piece)
            .await
            .is_ok()
        {}
    };
    tokio::time::timeout(BOUND, sending)
        .await
        .expect("it is never ended");
}
