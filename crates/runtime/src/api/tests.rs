//! Calls to a VMM that lies, hangs, dies and never stops talking.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;

const SOCKET: &str = "api.sock";

/// What the scripted VMM does with a connection once it has read a request.
#[derive(Clone, Copy)]
enum Act {
    Say(&'static str),
    /// Says it, and goes on with `x` for ever.
    Flood(&'static str),
    HangUp,
    Hang,
}

/// Does one act for each connection, the last for all further ones.
struct Vmm {
    files: tempfile::TempDir,
    asked: Arc<AtomicUsize>,
    breakers: Breakers,
    dir: MachineDir,
}

impl Vmm {
    fn new(acts: &'static [Act]) -> Self {
        let vmm = Self::absent();
        vmm.listen(acts);
        vmm
    }

    fn absent() -> Self {
        let files = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(files.path());
        std::fs::create_dir_all(dir.file(MachineDir::VMM)).unwrap();
        Self {
            files,
            asked: Arc::default(),
            breakers: Breakers::default(),
            dir,
        }
    }

    fn listen(&self, acts: &'static [Act]) {
        let path = self.files.path().join(MachineDir::VMM).join(SOCKET);
        let listener = UnixListener::bind(path).unwrap();
        let asked = self.asked.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let nth = asked.fetch_add(1, Ordering::Relaxed);
                let act = acts[nth.min(acts.len() - 1)];
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    assert!(stream.read(&mut request).await.unwrap() > 0);
                    match act {
                        Act::Say(words) => stream.write_all(words.as_bytes()).await.unwrap(),
                        Act::Flood(words) => {
                            stream.write_all(words.as_bytes()).await.unwrap();
                            while stream.write_all(&[b'x'; 65536]).await.is_ok() {}
                        }
                        Act::HangUp => {}
                        Act::Hang => std::future::pending().await,
                    }
                });
            }
        });
    }

    fn api(&self) -> Api<'_> {
        Api::new(&self.dir, MachineDir::VMM, SOCKET, "", &self.breakers)
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

const GOOD: &str = "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{\"state\":1}";
const DONE: &str = "HTTP/1.1 204 No Content\r\n\r\n";

fn words(error: Error) -> String {
    match error {
        Error::Monitor { answer, .. } => answer,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn questions_orders_and_changes_are_answered() {
    let vmm = Vmm::new(&[Act::Say(GOOD), Act::Say(DONE)]);
    let value: Value = vmm.api().get("/").await.unwrap();
    assert_eq!(value, json!({"state": 1}));
    vmm.api().put("/x", &json!({"a": 1})).await.unwrap();
    vmm.api().patch("/x", &json!({"a": 1})).await.unwrap();
    vmm.api().order("/x").await.unwrap();
    assert_eq!(vmm.asked(), 4);
}

#[tokio::test]
async fn the_words_of_a_refusal_are_passed_on_printable_and_bounded() {
    for (status, body, understood) in [
        (
            "400 Bad",
            r#"{"fault_message":"no \u001b[31mdrive\u202e x"}"#,
            "no ?[31mdrive? x",
        ),
        (
            "500 Bad",
            r#"["cannot boot","no kernel"]"#,
            "cannot boot: no kernel",
        ),
        ("500 Bad", "out of order", "out of order"),
        ("404 Bad", "", "status 404"),
        ("302 No\r\nLocation: http://127.0.0.1/", "", "status 302"),
    ] {
        let length = body.len();
        let said = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}");
        let vmm = Vmm::new(vec![Act::Say(said.leak())].leak());
        let refused = vmm.api().order("/x").await.unwrap_err();
        assert_eq!(words(refused), understood);
    }
    assert!(refusal(StatusCode::BAD_REQUEST, "ä".repeat(9999).as_bytes()).len() <= WORDS);
}

#[tokio::test]
async fn a_question_is_repeated_when_the_connection_breaks_and_an_order_never() {
    let vmm = Vmm::new(&[
        Act::HangUp,
        Act::Say("HTTP/1.1 200 OK\r\nContent-Le"),
        Act::Say(GOOD),
    ]);
    let _: Value = vmm.api().get("/").await.unwrap();
    assert_eq!(vmm.asked(), 3);

    let vmm = Vmm::new(&[Act::HangUp, Act::Say(DONE)]);
    words(vmm.api().order("/x").await.unwrap_err());
    assert_eq!(vmm.asked(), 1);

    let vmm = Vmm::new(&[Act::HangUp]);
    words(vmm.api().get::<Value>("/").await.unwrap_err());
    assert_eq!(vmm.asked(), TRIES as usize);
}

#[tokio::test]
async fn endless_answers_end() {
    for acts in [
        &[Act::Flood(
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        )] as &[_],
        &[Act::Flood(
            "HTTP/1.1 400 No\r\nContent-Length: 99999999999\r\n\r\n",
        )],
        &[Act::Flood("HTTP/1.1 200 OK\r\nA: ")],
        &[Act::Flood("")],
        &[Act::Say("SSH-2.0-OpenSSH_9.2\r\n\r\n")],
        &[Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")],
    ] {
        let vmm = Vmm::new(acts);
        words(vmm.api().get::<String>("/").await.unwrap_err());
        assert_eq!(vmm.asked(), 1, "nonsense stays nonsense");
    }
}

#[tokio::test]
async fn a_vmm_that_hangs_is_given_up_and_then_not_asked() {
    let vmm = Vmm::new(&[Act::Hang]);
    for _ in 0..3 {
        let api = vmm.api().within(Duration::from_millis(20));
        let silent = api.get::<Value>("/").await.unwrap_err();
        assert!(matches!(silent, Error::Timeout { .. }), "{silent}");
    }
    let asked = vmm.asked();
    let hung = vmm.api().order("/x").await.unwrap_err();
    assert!(matches!(hung, Error::Hung { .. }), "{hung}");
    assert_eq!(vmm.asked(), asked);
}

#[tokio::test]
async fn a_vmm_that_is_starting_is_waited_for_and_one_that_is_gone_is_not() {
    let vmm = Vmm::absent();
    let gone = vmm.api().get::<Value>("/").await.unwrap_err();
    assert!(matches!(gone, Error::NotRunning { .. }), "{gone}");
    let api = vmm.api();
    let late = async {
        sleep(Duration::from_millis(30)).await;
        vmm.listen(&[Act::HangUp, Act::Say(GOOD)]);
    };
    let (ready, ()) = tokio::join!(api.ready::<Value>("/"), late);
    ready.unwrap();
}
