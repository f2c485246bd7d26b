//! What every command has in common: help, errors, hints, exit codes, which server is meant, closed pipes.

use std::io::pipe;

use crate::fake::Fake;
use crate::hutch::{Hutch, ended};

#[tokio::test]
async fn every_command_has_a_line_of_help_and_examples() {
    let hutch = Hutch::alone();
    let mut commands = vec![vec![]];
    let mut seen = 0;
    while let Some(path) = commands.pop() {
        let help = hutch.run(&[path.as_slice(), &["--help"]].concat()).await;
        assert_eq!(help.code, Some(0), "{path:?}");
        let about = help.stdout.lines().next().unwrap();
        assert!(
            (5..=90).contains(&about.len()) && !about.ends_with('.'),
            "{path:?}: {about:?}"
        );
        assert!(
            help.stdout.contains("Examples:\n  hutch "),
            "{path:?} has no examples"
        );
        let list = help.stdout.split("Commands:\n").nth(1).unwrap_or("");
        for line in list.lines().take_while(|line| line.starts_with("  ")) {
            let name: &'static str = line.split_whitespace().next().unwrap().to_owned().leak();
            assert!(
                line.trim().len() > name.len() + 5,
                "{name} has no line of help"
            );
            commands.push([path.as_slice(), &[name]].concat());
        }
        seen += 1;
    }
    assert!(seen > 40, "it found {seen}");
}

#[tokio::test]
async fn with_no_server_it_says_so_and_what_to_do() {
    let hutch = Hutch::alone();
    if std::net::TcpStream::connect("127.0.0.1:8080").is_ok() {
        println!("skipped: something listens on 127.0.0.1:8080");
        return;
    }
    let ended = hutch.run(&["list"]).await;
    let shown = ended
        .shown()
        .replace(hutch.home.path().to_str().unwrap(), "HOME");
    insta::assert_snapshot!(shown, @r"
    exit code 1
    --- stdout
    --- stderr
    error: no server answers at HOME/data/hutch.sock or http://127.0.0.1:8080
    hint: start one with `hutch serve`, or give `--embedded` to `hutch run`; HUTCH_URL says where another one is
    ");
    assert_eq!(
        hutch.run(&["exec", "web", "--", "true"]).await.code,
        Some(125)
    );
    assert_eq!(
        hutch.run(&["run", "busybox", "--", "true"]).await.code,
        Some(125)
    );
}

#[tokio::test]
async fn a_server_that_is_named_and_not_there_is_named_again() {
    let ended = Hutch::at("http://127.0.0.1:1").run(&["get", "web"]).await;
    assert_eq!(ended.code, Some(1));
    let (error, hint) = ended.stderr.split_once('\n').unwrap();
    assert!(
        error.starts_with("error: no server answers at http://127.0.0.1:1: "),
        "{error}"
    );
    assert!(
        hint.starts_with("hint: start one with `hutch serve`"),
        "{hint}"
    );
}

#[tokio::test]
async fn the_socket_of_the_data_directory_comes_first_and_needs_no_key() {
    let fake = Fake::start().await;
    let hutch = Hutch::alone();
    fake.listen_at(&hutch.home.path().join("data/hutch.sock"));
    std::fs::write(hutch.home.path().join("data/admin.key"), "secret").unwrap();
    assert_eq!(hutch.run(&["list", "-q"]).await.code, Some(0));
    assert_eq!(fake.last_key(), "none");
}

#[tokio::test]
async fn only_the_key_from_the_environment_goes_to_a_server_that_is_named() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    std::fs::create_dir(hutch.home.path().join("data")).unwrap();
    std::fs::write(hutch.home.path().join("data/admin.key"), "secret").unwrap();
    assert_eq!(hutch.run(&["list"]).await.code, Some(0));
    assert_eq!(fake.last_key(), "none");
    let with_key = hutch
        .command(&["list"])
        .env("HUTCH_TOKEN", "mine")
        .spawn()
        .unwrap();
    assert_eq!(ended(with_key).await.code, Some(0));
    assert_eq!(fake.last_key(), "Bearer mine");
}

#[tokio::test]
async fn errors_have_a_hint_and_an_exit_code_of_their_kind() {
    let hutch = Hutch::at(&Fake::start().await.url);
    insta::assert_snapshot!(hutch.run(&["get", "absent"]).await.shown(), @r"
    exit code 4
    --- stdout
    --- stderr
    error: machine `absent` not found
    hint: `hutch list` shows all
    ");
    insta::assert_snapshot!(hutch.run(&["get", "denied"]).await.shown(), @r"
    exit code 5
    --- stdout
    --- stderr
    error: no valid key was shown
    hint: set HUTCH_TOKEN to a key of the server; its first one is in admin.key in its data directory
    ");
    assert_eq!(hutch.run(&["get", "hostile"]).await.code, Some(6));
    assert_eq!(
        hutch.run(&["get", "../keys"]).await.code,
        Some(4),
        "it is one name, not a path"
    );
    assert_eq!(hutch.run(&["get"]).await.code, Some(2));
    assert_eq!(
        hutch
            .run(&["create", "debian-base", "--name", "-x"])
            .await
            .code,
        Some(2)
    );
    assert_eq!(hutch.run(&["exec", "absent", "true"]).await.code, Some(125));
    assert_eq!(
        hutch.run(&["--json", "exec", "-q"]).await.code,
        Some(125),
        "wrong arguments"
    );
}

#[tokio::test]
async fn text_from_elsewhere_cannot_steer_the_terminal() {
    let hutch = Hutch::at(&Fake::start().await.url);
    insta::assert_snapshot!(hutch.run(&["get", "hostile"]).await.shown(), @r"
    exit code 6
    --- stdout
    --- stderr
    error: it says \u{1b}[2J\u{7}
    hint: look\u{1b}]0;x\u{7}
    ");
    let broken = hutch.run(&["get", "broken"]).await;
    assert!(
        broken
            .stdout
            .contains(r"reason     the guest said \u{1b}[31mno"),
        "{}",
        broken.stdout
    );
}

#[tokio::test]
async fn an_answer_of_something_else_is_not_taken_for_ours() {
    let ended = Hutch::at(&Fake::start().await.url)
        .run(&["get", "web-site"])
        .await;
    assert_eq!(ended.code, Some(4));
    assert!(
        ended.stderr.contains("not as a Hutch server does"),
        "{}",
        ended.stderr
    );
    assert!(!ended.stderr.contains("<h1>"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_closed_pipe_is_no_panic_and_no_message() {
    let hutch = Hutch::at(&Fake::start().await.url);
    for arguments in [
        &["list"][..],
        &["image", "ls", "-q"],
        &["logs", "web"],
        &["exec", "web", "hang"],
        &["completion", "bash"],
    ] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let child = hutch.command(arguments).stdout(writer).spawn().unwrap();
        let ended = ended(child).await;
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (Some(141), ""),
            "{arguments:?}"
        );
    }
}

#[tokio::test]
async fn shells_can_complete() {
    let script = Hutch::alone().run(&["completion", "bash"]).await;
    assert_eq!(script.code, Some(0));
    assert!(script.stdout.contains("complete -F"), "{}", script.stdout);
}
