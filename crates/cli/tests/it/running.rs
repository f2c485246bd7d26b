//! Commands in machines: streams, exit codes, standard input, and what is left of a temporary machine.

use tokio::io::AsyncReadExt;

use crate::fake::{Fake, MACHINE_ID};
use crate::hutch::{Hutch, ended, send};

#[tokio::test]
async fn streams_stay_apart_and_the_exit_code_is_the_commands() {
    let hutch = Hutch::at(&Fake::start().await.url);
    insta::assert_snapshot!(hutch.run(&["exec", "web", "--", "both"]).await.shown(), @r"
    exit code 3
    --- stdout
    out
    --- stderr
    err
    ");
}

#[tokio::test]
async fn what_follows_the_command_belongs_to_it() {
    let hutch = Hutch::at(&Fake::start().await.url);
    let arguments = [
        "exec",
        "-e",
        "A=b=c",
        "-w",
        "/srv",
        "-u",
        "www",
        "--timeout",
        "90s",
        "web",
        "show",
        "--json",
        "-x",
    ];
    insta::assert_snapshot!(hutch.run(&arguments).await.stderr, @r#"error: {"command":["show","--json","-x"],"cwd":"/srv","env":{"A":"b=c"},"timeout_ms":90000,"user":"www"}"#);
}

#[tokio::test]
async fn standard_input_goes_in_when_asked_for_and_within_its_limit() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    let limit = 1024 * 1024;
    let echoed = hutch
        .run_with(&["exec", "-i", "web", "echo-stdin"], &vec![b'x'; limit])
        .await;
    assert_eq!(
        (echoed.code, echoed.stdout.len()),
        (Some(0), limit),
        "{}",
        echoed.stderr
    );
    let asked = fake.requests().len();
    let refused = hutch
        .run_with(&["exec", "-i", "web", "echo-stdin"], &vec![b'x'; limit + 1])
        .await;
    insta::assert_snapshot!(refused.shown(), @r"
    exit code 125
    --- stdout
    --- stderr
    error: standard input is larger than 1 MiB
    hint: copy it into the machine first, with `hutch cp - MACHINE:/path`
    ");
    assert_eq!(fake.requests().len(), asked, "nothing was run");
}

#[tokio::test]
async fn a_command_that_cannot_be_followed_is_our_failure() {
    let hutch = Hutch::at(&Fake::start().await.url);
    let gone = hutch.run(&["exec", "web", "gone"]).await;
    assert_eq!(gone.code, Some(125));
    assert!(
        gone.stderr
            .starts_with("error: read the command's events: "),
        "{}",
        gone.stderr
    );
    let slow = hutch.run(&["exec", "web", "slow"]).await;
    assert_eq!(slow.code, Some(137));
    assert!(
        slow.stderr.contains("longer than --timeout"),
        "{}",
        slow.stderr
    );
    let lossy = hutch.run(&["exec", "web", "lossy"]).await;
    assert_eq!(
        (lossy.code, lossy.stderr.as_str()),
        (Some(0), "hutch: 7 bytes of output were lost\n")
    );
}

#[tokio::test]
async fn run_leaves_no_machine_and_passes_the_exit_code_on() {
    let fake = Fake::start().await;
    let ended = Hutch::at(&fake.url)
        .run(&["run", "debian-base", "both"])
        .await;
    insta::assert_snapshot!(ended.shown(), @r"
    exit code 3
    --- stdout
    out
    --- stderr
    err
    ");
    let id = format!("/v1/machines/{MACHINE_ID}");
    let verbs = fake
        .requests()
        .iter()
        .map(|request| request.replace(&id, "M"))
        .collect::<Vec<_>>();
    insta::assert_snapshot!(verbs.join("\n"), @r"
    POST /v1/machines
    POST M/wait?status=running&timeout_ms=30000
    POST M/exec
    DELETE M
    POST M/wait?status=deleted&timeout_ms=30000
    ");
}

#[tokio::test]
async fn run_deletes_the_machine_when_it_fails_too() {
    for arguments in [
        &["run", "--name", "doomed", "debian-base", "both"][..],
        &["run", "debian-base", "gone"],
    ] {
        let fake = Fake::start().await;
        let ended = Hutch::at(&fake.url).run(arguments).await;
        assert_eq!(ended.code, Some(125));
        assert!(
            ended.stderr.starts_with("error: ") && ended.stderr.contains("with --keep it stays")
        );
        assert!(
            fake.requests()
                .contains(&format!("DELETE /v1/machines/{MACHINE_ID}")),
            "{arguments:?}"
        );
    }
}

#[tokio::test]
async fn run_keeps_the_machine_when_asked_to() {
    let fake = Fake::start().await;
    let ended = Hutch::at(&fake.url)
        .run(&["run", "--keep", "debian-base", "both"])
        .await;
    assert_eq!(ended.code, Some(3));
    assert!(
        ended
            .stderr
            .contains("The machine very-silly-penguin is kept."),
        "{}",
        ended.stderr
    );
    assert!(
        !fake
            .requests()
            .iter()
            .any(|request| request.starts_with("DELETE"))
    );
}

#[tokio::test]
async fn an_interrupted_run_shows_what_there_was_and_deletes_the_machine() {
    for (signal, code) in [
        (rustix::process::Signal::INT, 130),
        (rustix::process::Signal::TERM, 143),
    ] {
        let fake = Fake::start().await;
        let mut child = Hutch::at(&fake.url)
            .command(&["run", "debian-base", "hang"])
            .spawn()
            .unwrap();
        let mut first = [0; 4];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut first)
            .await
            .unwrap();
        assert_eq!(&first, b"out\n", "output comes as it is made");
        send(&child, signal);
        // `timeout` sends its signal twice: that is no wish to leave the machine behind.
        fake.asked("status=deleted").await;
        send(&child, signal);
        let ended = ended(child).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(code), ""));
        assert!(
            fake.requests()
                .contains(&format!("DELETE /v1/machines/{MACHINE_ID}"))
        );
    }
}

#[tokio::test]
async fn a_machine_whose_creation_was_not_yet_answered_is_deleted_too() {
    let fake = Fake::start().await;
    let child = Hutch::at(&fake.url)
        .command(&["run", "sluggish", "both"])
        .spawn()
        .unwrap();
    fake.has_a_machine().await;
    send(&child, rustix::process::Signal::INT);
    assert_eq!(ended(child).await.code, Some(130));
    assert!(
        fake.requests()
            .contains(&format!("DELETE /v1/machines/{MACHINE_ID}"))
    );
}
