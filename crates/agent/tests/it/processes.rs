//! Starting processes, feeding them, and how they end.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use hutch_guest::pb;
use tokio_stream::iter;
use tonic::Code;

use crate::harness::*;

#[tokio::test]
async fn both_streams_come_apart_with_the_exit_code() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let seen = exec(&mut client, shell("p", "echo out; echo err >&2; exit 3")).await;
    assert_eq!(seen.stdout, b"out\n");
    assert_eq!(seen.stderr, b"err\n");
    assert_eq!((seen.code(), seen.dropped), (Some(3), 0));
    let again = follow(&mut client, "p").await;
    assert_eq!((again.code(), again.stdout), (Some(3), b"out\n".to_vec()));
}

#[tokio::test]
async fn a_signal_is_not_an_exit_code() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let seen = exec(&mut client, shell("self", "kill -SEGV $$")).await;
    assert_eq!((seen.signal(), seen.code()), (Some(11), None));
    client
        .start(start("sleep", &["sleep", "1000"]))
        .await
        .unwrap();
    let signal = |signal| pb::SignalRequest {
        process_id: "sleep".into(),
        signal,
        all: false,
    };
    assert_eq!(code(client.signal(signal(0)).await), Code::InvalidArgument);
    assert_eq!(code(client.signal(signal(65)).await), Code::InvalidArgument);
    client.signal(signal(15)).await.unwrap();
    let exit = client
        .wait(pb::WaitRequest {
            process_id: "sleep".into(),
        })
        .await
        .unwrap();
    assert_eq!(
        exit.into_inner().how,
        Some(pb::exit_status::How::Signal(15))
    );
    assert_eq!(
        code(client.signal(signal(15)).await),
        Code::FailedPrecondition
    );
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_no_row() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let missing = start_error(&mut client, start("a", &["no-such-program"])).await;
    assert_eq!(missing.code(), Code::NotFound);
    assert_eq!(missing.message(), "executable not found: no-such-program");
    std::fs::write(agent.root().join("data"), "not a program").unwrap();
    let mode = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(agent.root().join("data"), mode).unwrap();
    let denied = start_error(&mut client, start("b", &["./data"])).await;
    assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(agent.root().join("data"), mode).unwrap();
    let format = start_error(&mut client, start("c", &["./data"])).await;
    assert_eq!(format.code(), Code::FailedPrecondition, "{format}");
    let mut request = start("d", &["true"]);
    request.cwd = "/no/such/dir".into();
    let cwd = start_error(&mut client, request).await;
    assert_eq!(
        cwd.message(),
        "working directory /no/such/dir: no such file or directory"
    );
    let mut request = start("e", &["true"]);
    request.user = "no-such-user".into();
    assert_eq!(
        start_error(&mut client, request).await.code(),
        Code::NotFound
    );
    for bad in [
        start("", &["true"]),
        start("f", &[]),
        start("f", &[""]),
        start("f", &["a\0b"]),
    ] {
        assert_eq!(
            start_error(&mut client, bad).await.code(),
            Code::InvalidArgument
        );
    }
    for name in ["", "A=B", "A\0"] {
        let mut request = start("g", &["true"]);
        request.environment.insert(name.into(), "x".into());
        assert_eq!(
            start_error(&mut client, request).await.code(),
            Code::InvalidArgument
        );
    }
    let rows = client
        .list_processes(pb::ListProcessesRequest {})
        .await
        .unwrap();
    assert!(rows.into_inner().processes.is_empty());
}

#[tokio::test]
async fn a_second_start_with_the_same_id_is_the_first_one() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let script = "echo x >> count; sleep 1000";
    let first = client.start(shell("p", script)).await.unwrap().into_inner();
    let mut other = client.clone();
    let (second, third) = tokio::join!(
        client.start(shell("p", script)),
        other.start(shell("p", "echo y >> count")),
    );
    assert_eq!(second.unwrap().into_inner(), first);
    assert_eq!(third.unwrap().into_inner(), first);
    let count = agent.root().join("count");
    // The file is there before the line is in it.
    let written = || std::fs::read_to_string(&count).is_ok_and(|text| text.ends_with('\n'));
    until("the process has written", written).await;
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n");
}

#[tokio::test]
async fn environment_directory_and_user_come_from_request_then_configure_then_account() {
    let agent = Agent::start();
    let mut client = agent.greet().await;
    let mut configure = pb::ConfigureRequest {
        default_cwd: "sub".into(),
        ..Default::default()
    };
    configure
        .environment
        .insert("FROM".into(), "configure".into());
    configure
        .environment
        .insert("BOTH".into(), "configure".into());
    client.configure(configure).await.unwrap();
    std::fs::create_dir(agent.root().join("sub")).unwrap();
    let mut request = shell(
        "p",
        "pwd; echo $FROM $BOTH $USER $HOME; umask; cat /proc/self/oom_score_adj",
    );
    request.environment.insert("BOTH".into(), "request".into());
    let seen = exec(&mut client, request).await;
    let sub = agent.root().join("sub").canonicalize().unwrap();
    let text = String::from_utf8(seen.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], sub.to_str().unwrap());
    assert!(lines[1].starts_with("configure request "), "{text}");
    assert_eq!(lines[2..], ["0022", "0"]);
    // Fresh: a session of its own, no descriptors of ours, default signals.
    let script = "ls -l /proc/self/fd | grep -c pipe; ls /proc/self/fd | wc -l; \
        grep -E 'SigIgn|SigBlk' /proc/self/status; cut -d' ' -f6 /proc/$$/stat; echo $$";
    let seen = exec(&mut client, shell("q", script)).await;
    let text = String::from_utf8(seen.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[1], "4", "{text}");
    assert!(
        lines[2].ends_with("0000000000000000") && lines[3].ends_with("0000000000000000"),
        "{text}"
    );
    assert_eq!(lines[4], lines[5]);
}

#[tokio::test]
async fn another_user_has_its_own_ids_groups_and_home() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: changing the user needs root");
    }
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = shell("p", "id -u; id -g; id -G; echo $HOME $USER");
    request.user = "daemon".into();
    request.cwd = "/".into();
    let seen = exec(&mut client, request).await;
    assert_eq!(
        String::from_utf8_lossy(&seen.stdout),
        "1\n1\n1\n/usr/sbin daemon\n"
    );
    let mut request = shell("q", "id -u; id -g");
    request.user = "4242:77".into();
    request.cwd = "/".into();
    let seen = exec(&mut client, request).await;
    assert_eq!(seen.stdout, b"4242\n77\n");
}

#[tokio::test]
async fn stdin_arrives_whole_and_ends_exactly() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = start("p", &["sha256sum"]);
    request.stdin = true;
    client.start(request).await.unwrap();
    let data = vec![42; 3_000_000];
    let mut chunks: Vec<_> = data
        .chunks(30_000)
        .map(|data| pb::InputChunk {
            process_id: "p".into(),
            data: data.to_vec().into(),
            eof: false,
        })
        .collect();
    chunks.push(pb::InputChunk {
        eof: true,
        ..Default::default()
    });
    let reply = client.input(iter(chunks)).await.unwrap().into_inner();
    assert_eq!(reply.accepted, 3_000_000);
    let seen = follow(&mut client, "p").await;
    let sum = <sha2::Sha256 as sha2::Digest>::digest(&data);
    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(String::from_utf8(seen.stdout).unwrap().starts_with(&hex));
    let late = pb::InputChunk {
        process_id: "p".into(),
        ..Default::default()
    };
    let reply = client.input(iter([late])).await.unwrap().into_inner();
    assert_eq!(reply.accepted, 0);
}

#[tokio::test]
async fn without_stdin_a_reader_sees_the_end_at_once() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let seen = exec(&mut client, start("p", &["cat"])).await;
    assert_eq!((seen.code(), seen.stdout.len()), (Some(0), 0));
}

#[tokio::test]
async fn input_that_nobody_reads_stalls_nobody_else_and_ends_with_the_process() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = start("deaf", &["sleep", "1000"]);
    request.stdin = true;
    client.start(request).await.unwrap();
    let chunk = || pb::InputChunk {
        process_id: "deaf".into(),
        data: vec![0; 32 * 1024].into(),
        eof: false,
    };
    let mut feeder = client.clone();
    let feeding = tokio::spawn(async move {
        let chunks: Vec<_> = std::iter::repeat_with(chunk).take(100).collect();
        feeder.input(iter(chunks)).await
    });
    for round in 0..20 {
        let seen = exec(&mut client, shell(&format!("p{round}"), "echo hi")).await;
        assert_eq!(seen.stdout, b"hi\n");
    }
    assert!(!feeding.is_finished());
    let kill = pb::SignalRequest {
        process_id: "deaf".into(),
        signal: 9,
        all: false,
    };
    client.signal(kill).await.unwrap();
    let reply = tokio::time::timeout(BOUND, feeding)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(reply.into_inner().accepted < 100 * 32 * 1024);
}

#[tokio::test]
async fn a_closed_stdin_takes_less_than_was_sent() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = shell("p", "exec <&-; sleep 1000");
    request.stdin = true;
    client.start(request).await.unwrap();
    let chunks = vec![
        pb::InputChunk {
            process_id: "p".into(),
            data: vec![0; 256 * 1024].into(),
            eof: true
        };
        4
    ];
    let reply = tokio::time::timeout(BOUND, client.input(iter(chunks)))
        .await
        .unwrap()
        .unwrap();
    assert!(reply.into_inner().accepted < 1024 * 1024);
}

#[tokio::test]
async fn exec_ends_with_the_leader_though_a_child_holds_the_pipes() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let script = "(trap '' HUP; echo $$ > pid; while sleep 0.01; do echo later; done) & head -c 100000 /dev/zero; exit 7";
    let seen = exec(&mut client, shell("p", script)).await;
    assert_eq!(seen.code(), Some(7));
    let zeros = seen.stdout.iter().filter(|byte| **byte == 0).count();
    assert_eq!(
        zeros, 100_000,
        "all that the leader wrote comes before the exit"
    );
    // The child's output is still collected.
    let mut longest = seen.end;
    for _ in 0..1000 {
        let late = follow(&mut client, "p").await;
        longest = longest.max(late.end);
        if longest > seen.end {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(longest > seen.end);
}

#[tokio::test]
async fn a_timeout_kills_the_whole_tree() {
    for agent in [Some(Agent::start()), Agent::start_with_cgroup()]
        .into_iter()
        .flatten()
    {
        let mut client = agent.client().await;
        let script =
            "sleep 1000 & echo $! > child; (setsid sleep 1001 & echo $! > other; wait) & wait";
        let mut request = shell("p", script);
        request.timeout_ms = 1000;
        let seen = exec(&mut client, request).await;
        assert_eq!(seen.signal(), Some(9));
        assert!(seen.exit.unwrap().timed_out);
        for name in ["child", "other"] {
            let pid = std::fs::read_to_string(agent.root().join(name)).unwrap();
            until("the tree is dead", || !is_alive(pid.trim())).await;
        }
    }
}

#[tokio::test]
async fn with_a_cgroup_even_a_daemon_belongs_to_its_process() {
    let Some(agent) = Agent::start_with_cgroup() else {
        return;
    };
    let mut client = agent.client().await;
    let script = "setsid sh -c 'setsid sleep 1000 & echo $! > pid' & wait; exit 0";
    exec(&mut client, shell("p", script)).await;
    let pid = agent.root().join("pid");
    until("the daemon runs", || pid.exists()).await;
    let pid = std::fs::read_to_string(pid).unwrap();
    assert!(is_alive(pid.trim()));
    client
        .forget(pb::ForgetRequest {
            process_id: "p".into(),
        })
        .await
        .unwrap();
    assert!(!is_alive(pid.trim()));
    let gone = client
        .wait(pb::WaitRequest {
            process_id: "p".into(),
        })
        .await;
    assert_eq!(code(gone), Code::NotFound);
}

#[tokio::test]
async fn a_terminal_is_one_stream_with_a_size_and_job_control() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = shell("p", "stty size; tty; read line; echo got $line; stty size");
    request.pty = Some(pb::PtySize { rows: 33, cols: 77 });
    client.start(request).await.unwrap();
    let mut events = attach(&mut client, "p", 0).await;
    let mut seen = Seen::default();
    while !String::from_utf8_lossy(&seen.stdout).contains("/dev/pts/") {
        seen.take(events.message().await.unwrap().unwrap());
    }
    assert!(seen.stdout.starts_with(b"33 77\r\n"));
    let size = Some(pb::PtySize { rows: 10, cols: 20 });
    client
        .resize(pb::ResizeRequest {
            process_id: "p".into(),
            size,
        })
        .await
        .unwrap();
    let line = pb::InputChunk {
        process_id: "p".into(),
        data: "hello\n".into(),
        eof: false,
    };
    client.input(iter([line])).await.unwrap();
    while let Some(event) = events.message().await.unwrap() {
        seen.take(event);
    }
    let text = String::from_utf8_lossy(&seen.stdout);
    assert!(text.ends_with("got hello\r\n10 20\r\n"), "{text:?}");
    assert_eq!((seen.code(), seen.stderr.len()), (Some(0), 0));
    client.start(start("q", &["true"])).await.unwrap();
    let resized = client
        .resize(pb::ResizeRequest {
            process_id: "q".into(),
            size,
        })
        .await;
    assert_eq!(code(resized), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_terminal_delivers_everything_before_the_exit() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    for round in 0..20 {
        let mut request = shell(&format!("p{round}"), "seq 1 3000; sleep 1000 & exit 5");
        request.pty = Some(pb::PtySize::default());
        let seen = exec(&mut client, request).await;
        assert_eq!(seen.code(), Some(5));
        assert!(seen.stdout.ends_with(b"3000\r\n"), "round {round}");
    }
}

#[tokio::test]
async fn end_of_input_on_a_terminal_ends_its_reader() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    let mut request = start("p", &["cat"]);
    request.pty = Some(pb::PtySize::default());
    client.start(request).await.unwrap();
    let line = pb::InputChunk {
        process_id: "p".into(),
        data: "x\n".into(),
        eof: true,
    };
    client.input(iter([line])).await.unwrap();
    assert_eq!(follow(&mut client, "p").await.code(), Some(0));
}

#[tokio::test]
async fn the_table_makes_room_by_forgetting_what_has_ended() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    for round in 0..1100 {
        client
            .start(start(&format!("p{round}"), &["true"]))
            .await
            .unwrap();
        if round % 50 == 0 {
            client
                .wait(pb::WaitRequest {
                    process_id: format!("p{round}"),
                })
                .await
                .unwrap();
        }
    }
    let rows = client
        .list_processes(pb::ListProcessesRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(rows.processes.len() <= 1024);
    assert_eq!(rows.processes.last().unwrap().process_id, "p1099");
}
