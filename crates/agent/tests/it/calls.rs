//! Hello, Configure, Quiesce and Shutdown, and which connection counts.

use hutch_guest::pb;
use tonic::Code;

use crate::harness::*;

#[tokio::test]
async fn nothing_works_before_hello_and_configure() {
    let agent = Agent::start();
    let mut client = agent.connect().await;
    let configure = pb::ConfigureRequest::default();
    assert_eq!(
        code(client.configure(configure.clone()).await),
        Code::FailedPrecondition
    );
    let hello = client
        .hello(pb::HelloRequest { generation: 1 })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (hello.generation, hello.configured, hello.quiesced),
        (hutch_guest::limits::GENERATION, false, false)
    );
    assert_eq!(hello.boot_nonce.len(), 16);
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(hello.boot_id, boot_id.trim());
    assert_eq!(
        start_error(&mut client, start("p", &["true"])).await.code(),
        Code::FailedPrecondition
    );
    let stat = pb::StatRequest {
        path: "/".into(),
        follow: false,
    };
    assert_eq!(
        code(client.stat(stat.clone()).await),
        Code::FailedPrecondition
    );
    client.configure(configure).await.unwrap();
    client.stat(stat).await.unwrap();
}

#[tokio::test]
async fn configure_says_what_a_host_process_cannot_do() {
    let agent = Agent::start();
    let mut client = agent.greet().await;
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let request = pb::ConfigureRequest {
        boot_nonce: vec![7; 16].into(),
        hostname: Some("web".into()),
        addresses: vec![pb::Address::default()],
        dns_servers: vec!["9.9.9.9".into()],
        ssh_authorized_keys: vec!["ssh-ed25519 x".into()],
        entropy: vec![1; 32].into(),
        clock_unix_ms: 1,
        grow_root: true,
        ..Default::default()
    };
    let reply = client
        .configure(request.clone())
        .await
        .unwrap()
        .into_inner();
    let fields: Vec<_> = reply
        .unapplied
        .iter()
        .map(|field| field.field.as_str())
        .collect();
    let all = [
        "addresses",
        "clock",
        "dns",
        "entropy",
        "grow_root",
        "hostname",
        "ssh_authorized_keys",
    ];
    assert_eq!(fields, all);
    assert_eq!(
        std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(),
        hostname
    );
    let hello = client
        .hello(pb::HelloRequest { generation: 1 })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (&hello.boot_nonce[..], hello.configured),
        (&[7; 16][..], true)
    );
    let short = pb::ConfigureRequest {
        boot_nonce: vec![7; 15].into(),
        ..request
    };
    assert_eq!(code(client.configure(short).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_new_hello_ends_the_older_connection_and_no_process() {
    let agent = Agent::start();
    let mut first = agent.client().await;
    first.start(shell("p", "sleep 1000")).await.unwrap();
    let mut events = attach(&mut first, "p", 0).await;
    // One that says nothing replaces nobody.
    let mut silent = agent.connect().await;
    let list = pb::ListProcessesRequest {};
    assert_eq!(
        code(silent.list_processes(list).await),
        Code::FailedPrecondition
    );
    first.list_processes(list).await.unwrap();
    let mut second = agent.greet().await;
    let broken = tokio::time::timeout(BOUND, events.message()).await.unwrap();
    assert!(broken.is_err());
    let rows = second
        .list_processes(list)
        .await
        .unwrap()
        .into_inner()
        .processes;
    assert!(rows.len() == 1 && rows[0].exit.is_none());
}

#[tokio::test]
async fn garbage_on_the_socket_disturbs_nobody() {
    use std::io::Write;
    let agent = Agent::start();
    let mut client = agent.client().await;
    for _ in 0..50 {
        let mut garbage =
            std::os::unix::net::UnixStream::connect(agent.dir.path().join("sock")).unwrap();
        let _ = garbage.write_all(&[0x5a; 10_000]);
    }
    assert_eq!(
        exec(&mut client, shell("p", "echo hi")).await.stdout,
        b"hi\n"
    );
}

#[tokio::test]
async fn quiesce_without_a_cgroup_is_refused() {
    let agent = Agent::start();
    let mut client = agent.client().await;
    assert_eq!(
        code(client.quiesce(pb::QuiesceRequest {}).await),
        Code::FailedPrecondition
    );
    assert_eq!(
        exec(&mut client, start("p", &["true"])).await.code(),
        Some(0)
    );
}

#[tokio::test]
async fn quiesce_freezes_processes_until_thaw_or_configure() {
    let Some(agent) = Agent::start_with_cgroup() else {
        return;
    };
    let mut client = agent.client().await;
    let script = "while :; do echo >> ticks; sleep 0.01; done";
    client.start(shell("p", script)).await.unwrap();
    let ticks = || std::fs::metadata(agent.root().join("ticks")).map_or(0, |meta| meta.len());
    until("it ticks", || ticks() > 2).await;
    for thawed_by_configure in [false, true] {
        client.quiesce(pb::QuiesceRequest {}).await.unwrap();
        let frozen_at = ticks();
        // The agent closes the session itself; the host comes again.
        let mut again = agent.connect().await;
        let hello = again
            .hello(pb::HelloRequest { generation: 1 })
            .await
            .unwrap()
            .into_inner();
        assert!(hello.quiesced);
        assert_eq!(
            start_error(&mut again, start("q", &["true"])).await.code(),
            Code::FailedPrecondition
        );
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        assert_eq!(ticks(), frozen_at);
        match thawed_by_configure {
            true => drop(
                again
                    .configure(pb::ConfigureRequest::default())
                    .await
                    .unwrap(),
            ),
            false => drop(again.thaw(pb::ThawRequest::default()).await.unwrap()),
        }
        until("it ticks again", || ticks() > frozen_at).await;
        let hello = again
            .hello(pb::HelloRequest { generation: 1 })
            .await
            .unwrap()
            .into_inner();
        assert!(!hello.quiesced);
        client = again;
    }
    // Nobody thaws: the agent does.
    client.quiesce(pb::QuiesceRequest {}).await.unwrap();
    let frozen_at = ticks();
    until("it thaws by itself", || ticks() > frozen_at).await;
}

#[tokio::test]
async fn shutdown_ends_all_processes_and_says_how_by_exit_code() {
    use pb::shutdown_request::Mode;
    for (mode, expected) in [(Mode::PowerOff, 0), (Mode::Reboot, 64)] {
        let agents = [Some(Agent::start()), Agent::start_with_cgroup()];
        for mut agent in agents.into_iter().flatten() {
            let mut client = agent.client().await;
            let script = "trap 'echo > terminated' TERM; setsid sleep 1000 & echo $! > pid; while :; do wait; done";
            client.start(shell("p", script)).await.unwrap();
            let pid = agent.root().join("pid");
            until("it runs", || {
                std::fs::read(&pid).is_ok_and(|pid| pid.ends_with(b"\n"))
            })
            .await;
            let request = pb::ShutdownRequest {
                mode: mode.into(),
                grace_ms: 1000,
            };
            client.shutdown(request).await.unwrap();
            let refused = client.start(start("q", &["true"])).await;
            assert!(refused.is_err());
            assert_eq!(agent.wait().code(), Some(expected));
            assert!(agent.root().join("terminated").exists());
            let pid = std::fs::read_to_string(pid).unwrap();
            until("the daemon is gone", || !is_alive(pid.trim())).await;
        }
    }
}

#[test]
fn arguments_that_make_no_sense_are_exit_code_2() {
    for args in [&[][..], &["serve"], &["serve", "--unix"], &["dance"]] {
        let ended = std::process::Command::new(env!("CARGO_BIN_EXE_hutch-agent"))
            .args(args)
            .output();
        assert_eq!(ended.unwrap().status.code(), Some(2), "{args:?}");
    }
    let version = std::process::Command::new(env!("CARGO_BIN_EXE_hutch-agent"))
        .arg("--version")
        .output();
    let text = String::from_utf8(version.unwrap().stdout).unwrap();
    assert_eq!(text, format!("hutch-agent {}\n", env!("CARGO_PKG_VERSION")));
}
