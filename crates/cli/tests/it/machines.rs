//! Machines, images and runtimes: lists, one of them, changes.

use crate::fake::Fake;
use crate::hutch::Hutch;

#[tokio::test]
async fn a_list_has_all_pages() {
    let hutch = Hutch::at(&Fake::start().await.url);
    insta::assert_snapshot!(hutch.run(&["list"]).await.shown(), @r"
    exit code 0
    --- stdout
    NAME                STATUS   IMAGE        RUNTIME  VCPU  MEMORY   DISK   AGE  URL  PORTS
    web                 running  debian-base  qemu     1     512 MiB  8 GiB  3h
    very-silly-penguin  failed   debian-base  qemu     1     512 MiB  8 GiB  3h
    --- stderr
    ");
    insta::assert_snapshot!(hutch.run(&["ls", "-q"]).await.stdout, @r"
    web
    very-silly-penguin
    ");
    let json = hutch.run(&["--json", "list"]).await.stdout;
    let names = json.lines().map(|line| {
        let machine: hutch_contract::machine::Machine = serde_json::from_str(line).unwrap();
        machine.name.to_string()
    });
    assert_eq!(names.collect::<Vec<_>>(), ["web", "very-silly-penguin"]);
}

#[tokio::test]
async fn an_empty_list_is_a_head_for_people_and_nothing_for_programs() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    let ended = hutch.run(&["list", "--status", "stopped"]).await;
    assert!(ended.stdout.starts_with("NAME") && ended.stdout.lines().count() == 1);
    assert!(fake.requests().last().unwrap().contains("status=stopped"));
    assert_eq!(
        hutch
            .run(&["list", "--status", "stopped", "--json"])
            .await
            .stdout,
        ""
    );
    assert_eq!(
        hutch.run(&["list", "--status", "asleep"]).await.code,
        Some(2)
    );
}

#[tokio::test]
async fn a_machine_is_shown_in_words_or_as_json() {
    let hutch = Hutch::at(&Fake::start().await.url);
    insta::assert_snapshot!(hutch.run(&["get", "web"]).await.stdout, @r"
    name       web
    id         mch-01arz3ndektsv4rrffq69g5fav
    status     running
    image      debian-base (img-01arz3ndektsv4rrffq69g5fav)
    runtime    qemu, emulation, no security boundary
    size       1 vCPU, 512 MiB, 8 GiB
    created    3h ago
    ");
    let json = hutch.run(&["get", "web", "--json"]).await.stdout;
    assert!(
        json.starts_with(r#"{"id":"mch-"#) && json.lines().count() == 1,
        "{json}"
    );
}

#[tokio::test]
async fn images_and_runtimes_are_listed() {
    let hutch = Hutch::at(&Fake::start().await.url);
    insta::assert_snapshot!(hutch.run(&["image", "ls"]).await.stdout, @r"
    NAME         FROM             DISK      USED        AGE  ID
    debian-base  debian bookworm  8.00 GiB  165.00 MiB  2d   img-01arz3ndektsv4rrffq69g5fav
    ");
    insta::assert_snapshot!(hutch.run(&["image", "inspect", "debian-base"]).await.stdout, @r"
    name       debian-base
    id         img-01arz3ndektsv4rrffq69g5fav
    from       debian bookworm
    disk       8.00 GiB, 165.00 MiB used
    sha256     0000000000000000000000000000000000000000000000000000000000000000
    created    2d ago
    ");
    insta::assert_snapshot!(hutch.run(&["runtime", "ls"]).await.stdout, @r"
    NAME         USABLE  VERSION  ACCELERATION  ISOLATION                        NOTE
    qemu         yes     7.2      tcg           emulation, no security boundary
    firecracker  no      -        -             hardware virtualization          not installed
    ");
}

#[tokio::test]
async fn create_waits_prints_the_name_and_shows_the_steps() {
    let fake = Fake::start().await;
    let ended = Hutch::at(&fake.url)
        .run(&["create", "debian-base", "--name", "web", "--timings"])
        .await;
    insta::assert_snapshot!(ended.shown(), @r"
    exit code 0
    --- stdout
    web
    --- stderr
    PHASE  AFTER   TOOK
    clone  0.0 ms  1.2 ms
    boot   1.2 ms  2000.0 ms
    ");
    let wait = fake.requests().pop().unwrap();
    assert!(wait.contains("/wait?status=running"), "{wait}");
}

#[tokio::test]
async fn create_without_waiting_does_not_wait() {
    let fake = Fake::start().await;
    let ended = Hutch::at(&fake.url)
        .run(&["create", "debian-base", "--no-wait", "--json"])
        .await;
    assert!(
        ended.stdout.contains(r#""status":"starting""#),
        "{}",
        ended.stdout
    );
    assert_eq!(fake.requests(), ["POST /v1/machines"]);
}

#[tokio::test]
async fn a_machine_that_fails_to_start_is_an_error_with_the_reason() {
    let ended = Hutch::at(&Fake::start().await.url)
        .run(&["create", "debian-base", "--name", "doomed"])
        .await;
    insta::assert_snapshot!(ended.shown(), @r"
    exit code 6
    --- stdout
    --- stderr
    error: machine `doomed` failed: no boot
    hint: `hutch logs doomed`
    ");
}

#[tokio::test]
async fn an_image_that_we_know_is_made_first() {
    let fake = Fake::start().await.without_images();
    let hutch = Hutch::at(&fake.url);
    insta::assert_snapshot!(hutch.run(&["create", "busybox", "--name", "web"]).await.shown(), @r"
    exit code 0
    --- stdout
    web
    --- stderr
    The image busybox is not there yet. Making it now, this once:
      fetch packages
      write the disk
    ");
    insta::assert_snapshot!(hutch.run(&["create", "unheard-of"]).await.shown(), @r"
    exit code 4
    --- stdout
    --- stderr
    error: image `unheard-of` not found
    ");
}

#[tokio::test]
async fn several_machines_are_named_in_order_and_failures_stop_no_other() {
    let hutch = Hutch::at(&Fake::start().await.url);
    insta::assert_snapshot!(hutch.run(&["delete", "a", "absent", "b"]).await.shown(), @r"
    exit code 4
    --- stdout
    a
    b
    --- stderr
    error: machine `absent` not found
    hint: `hutch list` shows all
    ");
    let forced = hutch.run(&["rm", "--force", "a", "absent"]).await;
    assert_eq!((forced.code, forced.stderr.as_str()), (Some(0), ""));
    assert_eq!(
        hutch.run(&["delete", "--json", "a"]).await.stdout,
        "{\"name\":\"a\"}\n"
    );
    assert_eq!(hutch.run(&["image", "rm", "absent"]).await.code, Some(4));
    assert_eq!(
        hutch
            .run(&["image", "rm", "-f", "absent", "old"])
            .await
            .code,
        Some(0)
    );
}

#[tokio::test]
async fn levels_are_waited_for() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    for (verb, level) in [
        ("start", "running"),
        ("stop", "stopped"),
        ("restart", "running"),
    ] {
        let ended = hutch.run(&[verb, "web"]).await;
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (Some(0), "web\n"),
            "{verb}: {}",
            ended.stderr
        );
        let requests = fake.requests();
        let [.., asked, waited] = requests.as_slice() else {
            panic!("{requests:?}")
        };
        assert_eq!(*asked, format!("POST /v1/machines/web/{verb}"));
        assert!(waited.contains(&format!("wait?status={level}")), "{waited}");
    }
    hutch.run(&["stop", "--no-wait", "web"]).await;
    assert_eq!(
        fake.requests().last().unwrap(),
        "POST /v1/machines/web/stop"
    );
}

#[tokio::test]
async fn how_a_machine_is_reached_is_shown_and_changed() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    insta::assert_snapshot!(hutch.run(&["get", "shop"]).await.stdout, @r"
    name       shop
    id         mch-01arz3ndektsv4rrffq69g5fav
    status     running
    image      debian-base (img-01arz3ndektsv4rrffq69g5fav)
    runtime    qemu, emulation, no security boundary
    size       1 vCPU, 512 MiB, 8 GiB
    url        http://shop.vms.localhost:8081 -> 8080, for keys and tokens
    url        http://3000-shop.vms.localhost:8081 -> 3000
    port       127.0.0.1:22001 -> 22, SSH
    port       [::]:8000 -> 80, not listening: in use
    created    3h ago
    ");
    let listed = hutch.run(&["port", "shop"]).await.stdout;
    assert_eq!(hutch.run(&["port", "ls", "shop"]).await.stdout, listed);
    insta::assert_snapshot!(listed, @r"
    127.0.0.1:22001 -> 22, SSH
    [::]:8000 -> 80, not listening: in use
    ");
    let added = hutch
        .run(&["port", "add", "shop", "80", "0.0.0.0:9000:90"])
        .await;
    insta::assert_snapshot!(added.stdout, @r"
    127.0.0.1:22002 -> 80
    0.0.0.0:9000 -> 90
    ");
    assert_eq!(
        hutch.run(&["port", "rm", "shop", "9000"]).await.stdout,
        "9000\n"
    );
    assert_eq!(
        fake.requests().last().unwrap(),
        "DELETE /v1/machines/shop/ports/9000"
    );
    let exposed = hutch
        .run(&["port", "expose", "shop", "all", "--json"])
        .await;
    assert!(
        exposed.stdout.contains(r#""expose":"all""#),
        "{}",
        exposed.stdout
    );
    let public = hutch
        .run(&["port", "access", "shop", "public", "--json"])
        .await;
    assert!(
        public.stdout.contains(r#""access":"public""#),
        "{}",
        public.stdout
    );
    assert_eq!(hutch.run(&["port"]).await.code, Some(2));
    assert_eq!(
        hutch.run(&["port", "add", "shop", "80/udp"]).await.code,
        Some(2)
    );
}

#[tokio::test]
async fn a_link_to_a_private_machine_has_a_token() {
    let fake = Fake::start().await;
    let hutch = Hutch::at(&fake.url);
    let link = async |arguments: &[&str]| hutch.run(arguments).await.stdout;
    assert_eq!(
        link(&["open", "shop"]).await,
        "http://shop.vms.localhost:8081/?hutch_token=86400.mac\n"
    );
    assert_eq!(
        link(&["open", "shop", "--port", "3000", "--for", "10m", "--json"]).await,
        "{\"url\":\"http://3000-shop.vms.localhost:8081/?hutch_token=600.mac\"}\n"
    );
    let refused = hutch.run(&["open", "shop", "--port", "5"]).await;
    assert_eq!(refused.code, Some(6), "{}", refused.stderr);
    let without = hutch.run(&["open", "web"]).await;
    assert_eq!(without.code, Some(1));
    assert!(without.stderr.contains("has no URL") && without.stderr.contains("hint: "));
}

#[tokio::test]
async fn ways_to_a_new_machine_are_asked_for_as_docker_writes_them() {
    let ended = Hutch::at(&Fake::start().await.url)
        .run(&[
            "create",
            "debian-base",
            "-p",
            "8000:80",
            "-p",
            "90",
            "--ssh",
            "--public",
            "--expose",
            "3000",
            "--http-port",
            "80",
            "--no-wait",
        ])
        .await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}
