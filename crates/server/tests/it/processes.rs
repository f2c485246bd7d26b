//! Processes of stub machines: started, attached to, fed, resized, signalled, and alive beyond clients and servers.

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt, stream};
use hutch_contract::client::{AttachEvent, AttachOutput, Client, Error};
use hutch_contract::error::Kind;
use hutch_contract::exec::{ExecEvent, ExecExit};
use hutch_contract::process::{
    MAX_FRAME_BYTES, OutputChannel, PtySize, SendSignal, Signal, StartProcess,
};
use hutch_server::Running;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::machines::{LONG, bench, body, command, spec};
use crate::{Home, by_socket, by_tcp};

fn sh(script: &str) -> StartProcess {
    StartProcess {
        command: ["sh", "-c", script].map(str::to_owned).into(),
        ..StartProcess::default()
    }
}

fn with_stdin(script: &str) -> StartProcess {
    StartProcess {
        stdin: true,
        ..sh(script)
    }
}

fn signal(name: &str) -> SendSignal {
    SendSignal {
        signal: Signal::Name(name.to_owned()),
        all: false,
    }
}

fn exited(code: i32) -> ExecExit {
    ExecExit {
        exit_code: code,
        signal: None,
        timed_out: false,
    }
}

/// A server with a running machine `a`.
async fn machine() -> Option<(Home, Running, Client)> {
    let (home, running, client) = bench().await?;
    client.create(&spec("a"), None, Some(LONG)).await.unwrap();
    Some((home, running, client))
}

async fn end(running: Running, client: Client) {
    client.delete("a", Some(LONG)).await.unwrap();
    running.shutdown().await;
}

/// Reads until `enough`; every byte must come once and in its place.
async fn read_until(
    output: &mut AttachOutput,
    next: &mut u64,
    mut enough: impl FnMut(&[u8]) -> bool,
) -> Vec<u8> {
    let mut all = Vec::new();
    while !enough(&all) {
        match output.next().await.unwrap().unwrap() {
            AttachEvent::Output { sequence, data, .. } => {
                assert_eq!(sequence, *next, "a byte is lost or repeated");
                *next += data.len() as u64;
                all.extend_from_slice(&data);
            }
            other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&all)),
        }
    }
    all
}

/// What comes until the end, and the end.
async fn read_to_end(output: &mut AttachOutput, next: &mut u64) -> (Vec<u8>, ExecExit) {
    let mut all = Vec::new();
    loop {
        match output.next().await.unwrap().unwrap() {
            AttachEvent::Output { sequence, data, .. } => {
                assert_eq!(sequence, *next, "a byte is lost or repeated");
                *next += data.len() as u64;
                all.extend_from_slice(&data);
            }
            AttachEvent::Exit(exit) => {
                assert!(output.next().await.is_none(), "nothing follows the exit");
                return (all, exit);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_listed_until_they_are_deleted() {
    let Some((_home, running, client)) = machine().await else {
        return;
    };
    assert_eq!(client.processes("a").await.unwrap(), []);
    let sleeping = client.start_process("a", &sh("exec sleep 1000")).await;
    let sleeping = sleeping.unwrap();
    let quick = client.start_process("a", &sh("exit 3")).await.unwrap();
    let exit = client.wait_process("a", quick.id.as_str(), LONG).await;
    assert_eq!(exit.unwrap(), exited(3));
    let listed = client.processes("a").await.unwrap();
    assert_eq!(
        [&listed[0].id, &listed[1].id],
        [&sleeping.id, &quick.id],
        "oldest first: {listed:?}"
    );
    assert_eq!(listed[0].command, ["sh", "-c", "exec sleep 1000"]);
    assert_eq!((listed[0].pid, &listed[0].exit), (sleeping.pid, &None));
    assert_eq!(listed[1].exit, Some(exited(3)));

    let id = sleeping.id.as_str();
    let short = Duration::from_millis(50);
    let late = client.wait_process("a", id, short).await.unwrap_err();
    assert_eq!(late.kind(), Kind::Timeout, "{late}");
    client
        .signal_process("a", id, &signal("TERM"))
        .await
        .unwrap();
    let exit = client.wait_process("a", id, LONG).await.unwrap();
    assert_eq!((exit.exit_code, exit.signal), (143, Some(15)));
    assert_eq!(client.process("a", id).await.unwrap().exit, Some(exit));
    let ended = client.signal_process("a", id, &signal("TERM")).await;
    assert_eq!(ended.unwrap_err().kind(), Kind::Conflict);

    client.delete_process("a", id).await.unwrap();
    assert_eq!(client.processes("a").await.unwrap().len(), 1);
    let running_one = client.start_process("a", &sh("sleep 1000")).await.unwrap();
    let waiting = client.wait_process("a", running_one.id.as_str(), LONG);
    let deleting = client.delete_process("a", running_one.id.as_str());
    let (waited, deleted) = tokio::join!(waiting, deleting);
    deleted.unwrap();
    match waited {
        Ok(exit) => assert_eq!(exit.signal, Some(9)),
        Err(error) => assert_eq!(error.kind(), Kind::NotFound, "deleted before the wait"),
    }
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_found_and_what_cannot_be_is_refused() {
    let Some((_home, running, client)) = machine().await else {
        return;
    };
    let gone = client.start_process("a", &sh("true")).await.unwrap();
    client.delete_process("a", gone.id.as_str()).await.unwrap();
    for id in [gone.id.as_str(), "prc-1", "1", "..%2f"] {
        let size = PtySize { rows: 1, cols: 1 };
        let errors = [
            client.process("a", id).await.unwrap_err(),
            client.wait_process("a", id, LONG).await.unwrap_err(),
            client
                .signal_process("a", id, &signal("TERM"))
                .await
                .unwrap_err(),
            client.resize_process("a", id, size).await.unwrap_err(),
            client
                .feed_process("a", id, body(vec![1]), true)
                .await
                .unwrap_err(),
            client
                .process_output("a", id, 0)
                .await
                .map(drop)
                .unwrap_err(),
            client.attach("a", id, 0, true).await.map(drop).unwrap_err(),
            client.delete_process("a", id).await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.code(), Some("process_not_found"), "{id}: {error}");
        }
    }
    let missing = client.start_process("a", &StartProcess::default()).await;
    assert_eq!(missing.unwrap_err().kind(), Kind::Invalid);
    let huge = StartProcess {
        pty: Some(PtySize { rows: 0, cols: 80 }),
        ..sh("true")
    };
    let huge = client.start_process("a", &huge).await.unwrap_err();
    assert_eq!(huge.kind(), Kind::Invalid, "{huge}");
    let none = StartProcess {
        command: vec!["/no/such/program".to_owned()],
        ..StartProcess::default()
    };
    assert!(client.start_process("a", &none).await.is_err());
    assert_eq!(client.processes("a").await.unwrap(), [], "none is left");
    let plain = client
        .start_process("a", &sh("exec sleep 1000"))
        .await
        .unwrap();
    let plain = plain.id.as_str();
    let party = client.signal_process("a", plain, &signal("PARTY")).await;
    assert_eq!(party.unwrap_err().kind(), Kind::Invalid);
    let size = PtySize { rows: 1, cols: 1 };
    let no_terminal = client.resize_process("a", plain, size).await.unwrap_err();
    assert_eq!(no_terminal.kind(), Kind::Conflict, "{no_terminal}");
    let no_stdin = client.feed_process("a", plain, body(vec![1]), false).await;
    assert_eq!(no_stdin.unwrap_err().kind(), Kind::Conflict);
    let beyond = client.attach("a", plain, 1, false).await.map(drop);
    assert_eq!(beyond.unwrap_err().kind(), Kind::Invalid);
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_attaches_again_loses_and_repeats_no_byte() {
    let Some((home, running, client)) = machine().await else {
        return;
    };
    let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exit 7";
    let expected: String = (0..20_000).map(|i| format!("line {i}\n")).collect();
    let process = client.start_process("a", &sh(script)).await.unwrap();
    let by_key = by_tcp(&running).with_token(&home.admin_key()).unwrap();
    let (mut all, mut next) = (Vec::new(), 0);
    // Over the socket and over TCP in turns, each leaving in the middle.
    for (turn, client) in [&client, &by_key, &client, &by_key].into_iter().enumerate() {
        let (_input, mut output) = client
            .attach("a", process.id.as_str(), next, false)
            .await
            .unwrap();
        let part = read_until(&mut output, &mut next, |read| read.len() > 100 * turn).await;
        all.extend(part);
    }
    let (_input, mut output) = client
        .attach("a", process.id.as_str(), next, false)
        .await
        .unwrap();
    let (rest, exit) = read_to_end(&mut output, &mut next).await;
    all.extend(rest);
    assert_eq!(exit, exited(7));
    assert!(all == expected.as_bytes(), "{} bytes", all.len());

    // And as events, from the middle on.
    let from = expected.len() as u64 - 5;
    let mut events = client
        .process_output("a", process.id.as_str(), from)
        .await
        .unwrap();
    let mut seen = Vec::new();
    while let Some(event) = events.next().await {
        seen.push(event.unwrap());
    }
    let [
        ExecEvent::Started { process: named },
        ExecEvent::Stdout { sequence, .. },
        ExecEvent::Exit(exit),
    ] = &seen[..]
    else {
        panic!("{seen:?}");
    };
    assert_eq!((named, *sequence, exit), (&process.id, from, &exited(7)));
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_input_arrives_as_it_was_sent_and_ends_when_it_is_ended() {
    let Some((_home, running, client)) = machine().await else {
        return;
    };
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 + i / 251) as u8).collect();

    // By requests: the first leaves it open.
    let cat = client
        .start_process("a", &with_stdin("exec cat"))
        .await
        .unwrap();
    let cat = cat.id.as_str();
    let (_input, mut output) = client.attach("a", cat, 0, false).await.unwrap();
    let feeding = async {
        let (first, second) = bytes.split_at(1_234_567);
        let fed = client
            .feed_process("a", cat, body(first.to_vec()), false)
            .await;
        assert_eq!(fed.unwrap().accepted_bytes, first.len() as u64);
        assert_eq!(client.process("a", cat).await.unwrap().exit, None);
        let broken = stream::iter([Err(std::io::ErrorKind::BrokenPipe.into())]).boxed();
        assert!(client.feed_process("a", cat, broken, true).await.is_err());
        let fed = client
            .feed_process("a", cat, body(second.to_vec()), true)
            .await;
        assert_eq!(fed.unwrap().accepted_bytes, second.len() as u64);
    };
    let mut next = 0;
    let ((), (all, exit)) = tokio::join!(feeding, read_to_end(&mut output, &mut next));
    assert_eq!(exit, exited(0));
    assert!(all == bytes, "{} bytes", all.len());

    // By an attachment, both directions at once.
    let cat = client
        .start_process("a", &with_stdin("exec cat >&2"))
        .await
        .unwrap();
    let (mut input, mut output) = client.attach("a", cat.id.as_str(), 0, true).await.unwrap();
    let feeding = async {
        input.write(&bytes).await.unwrap();
        input.end().await.unwrap();
    };
    let mut next = 0;
    let ((), (all, exit)) = tokio::join!(feeding, read_to_end(&mut output, &mut next));
    assert_eq!(exit, exited(0));
    assert!(all == bytes, "{} bytes", all.len());
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_reads_no_input_stops_nobody_else() {
    let Some((_home, running, client)) = machine().await else {
        return;
    };
    let deaf = client
        .start_process("a", &with_stdin("exec sleep 1000"))
        .await
        .unwrap();
    let deaf = deaf.id.as_str();
    let (mut input, mut output) = client.attach("a", deaf, 0, true).await.unwrap();
    let endless = async {
        loop {
            if input.write(&[0; 64 * 1024]).await.is_err() {
                return;
            }
        }
    };
    let others = async {
        let said = client.exec("a", &command("echo here")).await.unwrap();
        assert_eq!(said.stdout, "here\n");
        client
            .signal_process("a", deaf, &signal("KILL"))
            .await
            .unwrap();
        // What was still on its way to it may be told first.
        let exit = loop {
            match output.next().await.unwrap().unwrap() {
                AttachEvent::Refused(_) => {}
                event => break event,
            }
        };
        assert!(
            matches!(&exit, AttachEvent::Exit(exit) if exit.signal == Some(9)),
            "{exit:?}"
        );
    };
    tokio::select! {
        () = endless => panic!("it took everything"),
        () = others => {}
    }
    // One that closes its end says so.
    let closes = client
        .start_process("a", &with_stdin("exec <&-; exec sleep 1000"))
        .await;
    let closes = closes.unwrap().id;
    let (mut input, mut output) = client.attach("a", closes.as_str(), 0, true).await.unwrap();
    let refused = loop {
        input.write(&[0; 64 * 1024]).await.unwrap();
        let read = tokio::time::timeout(Duration::from_millis(20), output.next()).await;
        if let Ok(event) = read {
            break event.unwrap().unwrap();
        }
    };
    assert!(
        matches!(&refused, AttachEvent::Refused(why) if why.code == "stdin_closed"),
        "{refused:?}"
    );
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_the_size_that_it_is_given() {
    let Some((_home, running, client)) = machine().await else {
        return;
    };
    let script = "stty size; read line; stty size; echo \"got $line\"; trap 'echo stopped; exit 4' INT; \
        echo ready; while :; do sleep 0.05; done";
    let shell = StartProcess {
        pty: Some(PtySize { rows: 24, cols: 80 }),
        ..with_stdin(script)
    };
    let shell = client.start_process("a", &shell).await.unwrap();
    assert!(client.process("a", shell.id.as_str()).await.unwrap().pty);
    let (mut input, mut output) = client
        .attach("a", shell.id.as_str(), 0, true)
        .await
        .unwrap();
    let mut next = 0;
    let has = |what: &'static str| move |read: &[u8]| String::from_utf8_lossy(read).contains(what);
    read_until(&mut output, &mut next, has("24 80\r\n")).await;
    let size = PtySize {
        rows: 50,
        cols: 132,
    };
    input.resize(size).await.unwrap();
    input.write(b"hello\r").await.unwrap();
    let said = read_until(&mut output, &mut next, has("ready")).await;
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("50 132\r\n") && said.contains("got hello\r\n"),
        "{said:?}"
    );
    // As a byte typed into the terminal, which makes the signal of it.
    input.write(&[3]).await.unwrap();
    let (said, exit) = read_to_end(&mut output, &mut next).await;
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(said.contains("stopped"), "{said:?}");
    assert_eq!(exit, exited(4));
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attachment_goes_on_with_the_next_server() {
    let Some((home, running, client)) = machine().await else {
        return;
    };
    let script = "i=0; while read line; do echo $i $line; i=$((i+1)); done; exit 5";
    let process = client
        .start_process("a", &with_stdin(script))
        .await
        .unwrap();
    let process = process.id.as_str();
    let (mut input, mut output) = client.attach("a", process, 0, true).await.unwrap();
    let mut next = 0;
    let line = |read: &[u8]| read.ends_with(b"\n");
    input.write(b"one\n").await.unwrap();
    assert_eq!(read_until(&mut output, &mut next, line).await, b"0 one\n");
    running.shutdown().await;
    match output.next().await.unwrap() {
        Ok(AttachEvent::Error(why)) => assert_eq!(why.code, "stopping"),
        other => panic!("{other:?}"),
    }
    assert!(input.write(b"lost\n").await.is_err() || output.next().await.is_none());

    let running = home.start().await;
    let client = by_socket(running.socket());
    let (mut input, mut output) = client.attach("a", process, next, true).await.unwrap();
    input.write(b"two\n").await.unwrap();
    assert_eq!(read_until(&mut output, &mut next, line).await, b"1 two\n");
    input.end().await.unwrap();
    assert_eq!(
        read_to_end(&mut output, &mut next).await,
        (Vec::new(), exited(5))
    );
    end(running, client).await;
}

/// A WebSocket without a client that keeps the rules.
async fn raw(running: &Running, key: &str, path: &str) -> Result<WebSocketStream<TcpStream>, u16> {
    let mut request = format!("ws://{}{path}", running.addr())
        .into_client_request()
        .unwrap();
    let key = format!("Bearer {key}").parse().unwrap();
    request.headers_mut().insert("authorization", key);
    let stream = TcpStream::connect(running.addr()).await.unwrap();
    match tokio_tungstenite::client_async(request, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(tokio_tungstenite::tungstenite::Error::Http(answer)) => Err(answer.status().as_u16()),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_breaks_the_rules_of_an_attachment_is_told_and_left() {
    let Some((home, running, client)) = machine().await else {
        return;
    };
    let key = home.admin_key();
    let process = client
        .start_process("a", &with_stdin("exec cat"))
        .await
        .unwrap()
        .id;
    let path = format!("/v1/machines/a/processes/{process}/attach?stdin=true");
    assert_eq!(raw(&running, "wrong", &path).await.map(drop), Err(401));
    assert_eq!(
        raw(&running, &key, &format!("{path}&x=1")).await.map(drop),
        Err(400)
    );

    let frames = [
        (Message::Binary(Bytes::from_static(&[7, 1])), "invalid"),
        (Message::Binary(Bytes::new()), "invalid"),
        (Message::Text("party".into()), "invalid"),
        (Message::Text(r#"{"dance":1}"#.into()), "invalid"),
        (
            Message::Binary(vec![0; MAX_FRAME_BYTES + 1].into()),
            "too_large",
        ),
    ];
    for (frame, code) in frames {
        let mut socket = raw(&running, &key, &path).await.unwrap();
        let shown = format!("{frame:.40?}");
        socket.send(frame).await.unwrap();
        let mut last = String::new();
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Text(text) = message {
                last = text.to_string();
            }
        }
        assert!(
            last.starts_with(&format!(r#"{{"error":{{"code":"{code}""#)),
            "{shown}: {last}"
        );
    }
    // What merely cannot be done ends nothing.
    let path = format!("/v1/machines/a/processes/{process}/attach");
    let mut socket = raw(&running, &key, &path).await.unwrap();
    for (message, refused) in [
        (Message::Binary(Bytes::from_static(&[0, 1])), "no_stdin"),
        (
            Message::Text(r#"{"resize":{"rows":9,"cols":9}}"#.into()),
            "guest",
        ),
        (
            Message::Text(r#"{"resize":{"rows":0,"cols":9}}"#.into()),
            "invalid",
        ),
        (Message::Text(r#"{"signal":"PARTY"}"#.into()), "invalid"),
    ] {
        socket.send(message).await.unwrap();
        let said = loop {
            match socket.next().await.unwrap().unwrap() {
                Message::Text(text) => break text.to_string(),
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert!(
            said.starts_with(&format!(r#"{{"refused":{{"code":"{refused}""#)),
            "{said}"
        );
    }
    drop(socket);
    assert_eq!(
        client.process("a", process.as_str()).await.unwrap().exit,
        None,
        "the process knows nothing of all this"
    );
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_waits_for_who_reads_slowly_and_errors_are_told_apart() {
    let Some((_home, running, client)) = machine().await else {
        return;
    };
    let script = "head -c 6000000 /dev/zero; echo end >&2";
    let process = client.start_process("a", &sh(script)).await.unwrap();
    let (_input, mut output) = client
        .attach("a", process.id.as_str(), 0, false)
        .await
        .unwrap();
    let first = output.next().await.unwrap().unwrap();
    assert!(matches!(first, AttachEvent::Output { sequence: 0, .. }));
    let short = Duration::from_millis(300);
    let waits = client.wait_process("a", process.id.as_str(), short).await;
    assert_eq!(
        waits.unwrap_err().kind(),
        Kind::Timeout,
        "it waits for its reader"
    );
    let (mut bytes, mut errors) = (0, Vec::new());
    if let AttachEvent::Output { data, .. } = first {
        bytes += data.len();
    }
    let exit = loop {
        match output.next().await.unwrap().unwrap() {
            AttachEvent::Output { channel, data, .. } => match channel {
                OutputChannel::Stdout => bytes += data.len(),
                OutputChannel::Stderr => errors.extend_from_slice(&data),
            },
            AttachEvent::Exit(exit) => break exit,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        (bytes, &errors[..], exit),
        (6_000_000, &b"end\n"[..], exited(0))
    );
    end(running, client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_request_is_told_that_this_is_a_websocket() {
    let Some((home, running, client)) = machine().await else {
        return;
    };
    let process = client
        .start_process("a", &sh("exec sleep 1000"))
        .await
        .unwrap()
        .id;
    let answer = crate::plain_get(
        &running,
        &home.admin_key(),
        &format!("/v1/machines/a/processes/{process}/attach"),
    )
    .await;
    assert!(
        answer.starts_with("HTTP/1.1 426") && answer.contains("no_websocket"),
        "{answer}"
    );
    let unknown = client
        .attach("b", process.as_str(), 0, false)
        .await
        .map(drop);
    assert!(
        matches!(unknown, Err(Error::Api { status: 404, .. })),
        "{unknown:?}"
    );
    end(running, client).await;
}
