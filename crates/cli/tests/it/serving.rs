//! The server as a person starts and ends it. What it answers is tested elsewhere.

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;

use crate::hutch::{Hutch, ended, send};

/// Starts a server on a free port and waits for its line.
async fn serve(hutch: &Hutch) -> (Child, String) {
    let mut child = hutch
        .command(&["serve", "--listen", "127.0.0.1:0"])
        .spawn()
        .unwrap();
    let mut line = String::new();
    let stdout = child.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut line).await.unwrap();
    (child, line)
}

#[tokio::test]
async fn it_says_where_it_listens_and_ends_when_told_to() {
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let hutch = Hutch::alone();
        let (child, line) = serve(&hutch).await;
        let data = hutch.home.path().join("data");
        assert!(
            line.starts_with("hutch listens on http://127.0.0.1:"),
            "{line:?}"
        );
        assert!(
            line.contains(&format!("{}", data.join("hutch.sock").display())),
            "{line}"
        );
        assert!(
            line.contains(&format!("{}", data.join("admin.key").display())),
            "{line}"
        );
        assert_eq!(
            hutch.run(&["list", "-q"]).await.shown(),
            "exit code 0\n--- stdout\n--- stderr\n"
        );
        let key = std::fs::read_to_string(data.join("admin.key")).unwrap();
        let url = line.split_whitespace().nth(3).unwrap();
        let by_tcp = hutch
            .command(&["--url", url, "list"])
            .env("HUTCH_TOKEN", key)
            .spawn()
            .unwrap();
        assert_eq!(ended(by_tcp).await.code, Some(0));
        assert_eq!(
            hutch.run(&["--url", url, "list"]).await.code,
            Some(5),
            "without the key"
        );
        send(&child, signal);
        assert_eq!(ended(child).await.code, Some(0));
    }
}

#[tokio::test]
async fn a_second_server_on_the_same_data_says_so_and_leaves_the_first_alone() {
    let hutch = Hutch::alone();
    let (child, _) = serve(&hutch).await;
    let second = hutch.run(&["serve", "--listen", "127.0.0.1:0"]).await;
    assert_eq!(
        (second.code, second.stdout.as_str()),
        (Some(6), ""),
        "{}",
        second.stderr
    );
    assert!(
        second
            .stderr
            .contains("error: another server uses the data directory"),
        "{}",
        second.stderr
    );
    assert_eq!(hutch.run(&["list"]).await.code, Some(0));
    send(&child, rustix::process::Signal::TERM);
    assert_eq!(ended(child).await.code, Some(0));
}

#[tokio::test]
async fn settings_that_cannot_be_meant_are_refused_by_name() {
    let hutch = Hutch::alone();
    for (arguments, named) in [
        (&["serve", "--listen", "nonsense"][..], "listen"),
        (&["serve", "--config", "nowhere.toml"], "nowhere.toml"),
        (&["serve", "--log", "a=b=c"], "a=b=c"),
    ] {
        let refused = hutch.run(arguments).await;
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        assert!(
            refused.stderr.starts_with("error: ") && refused.stderr.contains(named),
            "{}",
            refused.stderr
        );
    }
    let misspelt = hutch
        .command(&["doctor"])
        .env("HUTCH_LIMITS_MACHNES", "3")
        .spawn()
        .unwrap();
    let misspelt = ended(misspelt).await;
    assert!(
        misspelt
            .stderr
            .contains("warning: HUTCH_LIMITS_MACHNES is no setting"),
        "{}",
        misspelt.stderr
    );
}

#[tokio::test]
async fn doctor_needs_no_server_and_tells_programs_the_same() {
    let hutch = Hutch::alone();
    let words = hutch.run(&["doctor"]).await;
    let json = hutch.run(&["doctor", "--json"]).await;
    assert_eq!(words.code, json.code);
    let findings: Vec<hutch_contract::node::Finding> = json
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        findings
            .iter()
            .all(|finding| words.stdout.contains(&finding.area)),
        "{}",
        words.stdout
    );
    let missing = findings
        .iter()
        .any(|finding| finding.level == hutch_contract::node::Level::Missing);
    assert_eq!(json.code, Some(i32::from(missing)));
    assert!(!hutch.home.path().join("data/hutch.sock").exists());
}
