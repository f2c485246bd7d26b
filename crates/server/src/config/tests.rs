//! Where each setting comes from, and what is refused.

use std::fs;
use std::path::Path;

use super::table::{KEYS, Shape};
use super::*;
use crate::Error;

/// An ordinary user's host with these variables besides HOME.
fn host(home: &Path, variables: &[(&str, &str)]) -> Host {
    let home = ("HOME", home.to_str().unwrap());
    let environment = variables.iter().copied().chain([home]);
    Host {
        root: false,
        executable: "/opt/hutch/bin/hutch".into(),
        environment: environment
            .map(|(name, value)| (name.into(), value.into()))
            .collect(),
    }
}

fn loaded(variables: &[(&str, &str)]) -> Loaded {
    load(&Flags::default(), &host(Path::new("/nowhere"), variables)).unwrap()
}

fn refusal(flags: &Flags, host: &Host) -> String {
    load(flags, host)
        .map(|loaded| loaded.config)
        .unwrap_err()
        .to_string()
}

fn entry(loaded: &Loaded, key: &str) -> (String, String) {
    let entry = loaded.entries().into_iter().find(|entry| entry.key == key);
    entry
        .map(|entry| (entry.value, entry.origin))
        .unwrap_or_default()
}

#[test]
fn the_documented_defaults_are_the_whole_table_and_load() {
    let all: String = DEFAULT_TOML
        .lines()
        .map(|line| line.strip_prefix("# ").unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n");
    for key in &KEYS {
        let name = key.path.rsplit('.').next().unwrap();
        assert!(
            all.lines()
                .any(|line| line.starts_with(&format!("{name} = "))),
            "{} is not documented",
            key.path
        );
        for also in key.also {
            assert!(DEFAULT_TOML.contains(also), "{also} is not documented");
        }
        if let Shape::Number(range) = &key.shape
            && (*range.start(), *range.end()) != (0, *range.end())
        {
            let text = format!("{} to {}", range.start(), range.end());
            assert!(
                DEFAULT_TOML.contains(&text),
                "the range of {} is not documented: {text}",
                key.path
            );
        }
    }
    let config = loaded(&[]).config;
    assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(config.data_dir, Path::new("/nowhere/.local/share/hutch"));
    assert_eq!(config.cache_dir, Path::new("/nowhere/.cache/hutch"));
    assert_eq!(config.agent, Path::new("/opt/hutch/bin/guest/hutch-agent"));
    assert_eq!(config.launcher, Path::new("/opt/hutch/bin/hutch"));
    assert!(
        config.api.token.is_none() && config.kernel.is_none() && config.runtime.default.is_none()
    );
    assert!(config.runtime.allow_emulation);
    let engine = config.engine();
    assert_eq!(engine.image_max_bytes, 64 << 30);
    assert_eq!(engine.console_bytes, 1 << 20);
}

#[test]
fn root_has_system_places_and_a_user_those_that_xdg_names() {
    let mut root = host(Path::new("/root"), &[("XDG_DATA_HOME", "/elsewhere")]);
    root.root = true;
    let config = load(&Flags::default(), &root).unwrap().config;
    assert_eq!(config.data_dir, Path::new("/var/lib/hutch"));
    assert_eq!(config.cache_dir, Path::new("/var/cache/hutch"));
    let user = loaded(&[
        ("XDG_DATA_HOME", "/data"),
        ("XDG_CACHE_HOME", "not/absolute"),
    ])
    .config;
    assert_eq!(user.data_dir, Path::new("/data/hutch"));
    assert_eq!(user.cache_dir, Path::new("/nowhere/.cache/hutch"));
}

#[test]
fn a_later_source_wins_and_each_value_knows_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    fs::write(
        &file,
        "listen = \"127.0.0.1:1\"\ndata_dir = \"/from/file\"\n[limits]\nmachines = 5\nmemory_overcommit = 2\n",
    )
    .unwrap();
    let flags = Flags {
        config: Some(file.clone()),
        listen: Some("127.0.0.1:3".to_owned()),
        ..Flags::default()
    };
    let variables = [
        ("HUTCH_LISTEN", "127.0.0.1:2"),
        ("HUTCH_LIMITS_MACHINES", "6"),
    ];
    let loaded = load(&flags, &host(dir.path(), &variables)).unwrap();
    let pair = |value: &str, origin: String| (value.to_owned(), origin);
    let from_file = format!("file {}", file.display());
    assert_eq!(
        entry(&loaded, "listen"),
        pair("127.0.0.1:3", "flag --listen".to_owned())
    );
    assert_eq!(
        entry(&loaded, "limits.machines"),
        pair("6", "environment variable HUTCH_LIMITS_MACHINES".to_owned())
    );
    assert_eq!(
        entry(&loaded, "limits.memory_overcommit"),
        pair("2", from_file.clone())
    );
    assert_eq!(entry(&loaded, "data_dir"), pair("/from/file", from_file));
    assert_eq!(
        entry(&loaded, "limits.boot_timeout_ms"),
        pair("120000", "default".to_owned())
    );
    assert_eq!(loaded.config.limits.machines, 6);
}

#[test]
fn the_usual_file_is_read_when_it_is_there_and_yaml_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join(".config/hutch")).unwrap();
    fs::write(
        dir.path().join(".config/hutch/config.toml"),
        "[limits]\nmachines = 7\n",
    )
    .unwrap();
    let usual = load(&Flags::default(), &host(dir.path(), &[])).unwrap();
    assert_eq!(usual.config.limits.machines, 7);
    let yaml = dir.path().join("hutch.yaml");
    fs::write(
        &yaml,
        "limits:\n  machines: 8\nruntime:\n  programs:\n    qemu: /opt/qemu\n",
    )
    .unwrap();
    let named = host(dir.path(), &[("HUTCH_CONFIG", yaml.to_str().unwrap())]);
    let config = load(&Flags::default(), &named).unwrap().config;
    assert_eq!(config.limits.machines, 8);
    assert_eq!(config.runtime.programs["qemu"], Path::new("/opt/qemu"));
}

#[test]
fn the_names_of_older_systems_work_and_give_way_to_ours() {
    let old = [
        ("API_PORT", "9000"),
        ("API_TOKEN", "12345"),
        ("DATA_DIR", "/old"),
        ("MAX_VMS_PER_HOST", "9"),
        ("SANDBOX_RUNTIME", "qemu"),
        ("KERNEL_PATH", "/old/vmlinux"),
        ("HYPERFLEET_KERNEL_ARGS", " loglevel=7  audit=0 "),
    ];
    let loaded_old = loaded(&old);
    let config = &loaded_old.config;
    assert_eq!(config.listen.to_string(), "127.0.0.1:9000");
    assert_eq!(config.api.token.as_ref().unwrap().expose(), "12345");
    assert_eq!(config.data_dir, Path::new("/old"));
    assert_eq!(config.limits.machines, 9);
    assert_eq!(config.runtime.default.as_deref(), Some("qemu"));
    let engine = config.engine();
    assert_eq!(engine.kernel.as_deref(), Some(Path::new("/old/vmlinux")));
    assert_eq!(engine.kernels.args, ["loglevel=7", "audit=0"]);
    assert_eq!(
        entry(&loaded_old, "listen").1,
        "environment variable API_PORT"
    );
    let mut both = old.to_vec();
    both.extend([
        ("HUTCH_DATA_DIR", "/new"),
        ("HUTCH_LISTEN", "127.0.0.1:1"),
        ("HUTCH_API_TOKEN", "new"),
    ]);
    let config = loaded(&both).config;
    assert_eq!(config.data_dir, Path::new("/new"));
    assert_eq!(config.listen.to_string(), "127.0.0.1:1");
    assert_eq!(config.api.token.unwrap().expose(), "new");
}

#[test]
fn each_older_name_of_the_kernel_works() {
    for name in ["FC_KERNEL", "HYPERFLEET_KERNEL_IMAGE_PATH", "KERNEL_PATH"] {
        let loaded = loaded(&[(name, "/k")]);
        assert_eq!(loaded.config.kernel.as_deref(), Some(Path::new("/k")));
        assert_eq!(
            entry(&loaded, "kernel").1,
            format!("environment variable {name}")
        );
    }
}

#[test]
fn kernels_have_names_paths_and_words() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let flags = Flags {
        config: Some(file.clone()),
        ..Flags::default()
    };
    let text = "[kernels.own]\npath = \"/k/vmlinux\"\nargs = \"a=1 b\"\n\n[kernels.\"6.12\"]\npath = \"/k/x.deb\"\nmodules = \"/m/6.12\"\n";
    fs::write(&file, text).unwrap();
    let host = host(dir.path(), &[]);
    let kernels = load(&flags, &host).unwrap().config.engine().kernels;
    assert_eq!(kernels.named.len(), 2);
    assert_eq!(kernels.named["own"].path, Path::new("/k/vmlinux"));
    assert_eq!(kernels.named["own"].args, ["a=1", "b"]);
    assert_eq!(
        kernels.named["6.12"].modules.as_deref(),
        Some(Path::new("/m/6.12"))
    );
    for (text, part) in [
        ("[kernels.own]\nargs = \"a\"\n", "path"),
        ("[kernels.own]\npath = \"/k\"\nmodule = \"/m\"\n", "module"),
    ] {
        fs::write(&file, text).unwrap();
        assert!(refusal(&flags, &host).contains(part), "{text}");
    }
}

#[test]
fn cpus_are_written_as_elsewhere() {
    for (text, expected) in [
        ("0", &[0][..]),
        ("0-3,8", &[0, 1, 2, 3, 8]),
        ("8, 2-3,3", &[2, 3, 8]),
    ] {
        let loaded = loaded(&[("HUTCH_RUNTIME_AFFINITY", text)]);
        assert_eq!(loaded.config.engine().runtime_options.affinity, expected);
    }
    assert!(
        loaded(&[])
            .config
            .engine()
            .runtime_options
            .affinity
            .is_empty()
    );
}

#[test]
fn an_empty_variable_is_none_and_a_misspelt_one_is_told() {
    let loaded = loaded(&[
        ("API_TOKEN", ""),
        ("HUTCH_LIMITS_MACHINS", "3"),
        ("HUTCH_URL", "http://x"),
        ("HUTCH_RUNTIME_PROGRAMS_CLOUD_HYPERVISOR", "/opt/ch"),
    ]);
    assert!(loaded.config.api.token.is_none());
    assert_eq!(loaded.unknown_variables, ["HUTCH_LIMITS_MACHINS"]);
    assert_eq!(
        loaded.config.runtime.programs["cloud-hypervisor"],
        Path::new("/opt/ch")
    );
}

#[test]
fn emulated_machines_need_a_switch_once_others_can_reach_the_api() {
    assert!(
        !loaded(&[("HUTCH_LISTEN", "0.0.0.0:8080")])
            .config
            .runtime
            .allow_emulation
    );
    assert!(
        loaded(&[("HUTCH_LISTEN", "[::1]:8080")])
            .config
            .runtime
            .allow_emulation
    );
    let open = [
        ("HUTCH_LISTEN", "0.0.0.0:8080"),
        ("HUTCH_RUNTIME_ALLOW_EMULATION", "yes"),
    ];
    assert!(loaded(&open).config.runtime.allow_emulation);
}

#[test]
fn the_key_is_shown_nowhere() {
    let loaded = loaded(&[("API_TOKEN", "tell-nobody")]);
    assert_eq!(entry(&loaded, "api.token").0, "(set)");
    assert!(!format!("{:?} {:?}", loaded.config, loaded.entries()).contains("tell-nobody"));
}

#[test]
fn a_bad_value_is_refused_with_its_key_its_origin_and_what_is_allowed() {
    let numbers = [
        "0",
        "-1",
        "65536",
        "1.5",
        "1e3",
        "many",
        "18446744073709551616",
    ];
    for (name, key, values, allowed) in [
        (
            "HUTCH_LIMITS_MACHINES",
            "limits.machines",
            &numbers[..],
            "from 1 to 65535",
        ),
        (
            "MAX_VMS_PER_HOST",
            "limits.machines",
            &numbers[..],
            "from 1 to 65535",
        ),
        (
            "HUTCH_LIMITS_BOOT_TIMEOUT_MS",
            "limits.boot_timeout_ms",
            &["999"][..],
            "from 1000 to 3600000",
        ),
        (
            "HUTCH_RUNTIME_ACCELERATION",
            "runtime.acceleration",
            &["hvf"][..],
            "kvm or tcg",
        ),
        (
            "HUTCH_RUNTIME_ALLOW_EMULATION",
            "runtime.allow_emulation",
            &["maybe"][..],
            "true or false",
        ),
        (
            "HUTCH_RUNTIME_AFFINITY",
            "runtime.affinity",
            &["3-1", "a", "0,", "-1", "8192", "0-99999999"][..],
            "such as 0-3,8",
        ),
        (
            "API_PORT",
            "listen",
            &["65536", "-1", "http"][..],
            "from 0 to 65535",
        ),
        (
            "HUTCH_LISTEN",
            "listen",
            &["8080", "localhost", "127.0.0.1:99999"][..],
            "",
        ),
    ] {
        for value in values {
            let text = refusal(
                &Flags::default(),
                &host(Path::new("/nowhere"), &[(name, value)]),
            );
            for part in [key, &format!("environment variable {name}"), allowed] {
                assert!(
                    text.contains(part),
                    "{name}={value}: `{text}` lacks `{part}`"
                );
            }
        }
    }
}

#[test]
fn a_bad_file_is_refused_with_its_path_and_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let flags = Flags {
        config: Some(file.clone()),
        ..Flags::default()
    };
    for (content, parts) in [
        (
            "[limits]\nmachines = 0\n",
            &["limits.machines", "1 to 65535"][..],
        ),
        (
            "[limits]\nmachines = \"many\"\n",
            &["limits.machines", "1 to 65535"][..],
        ),
        ("[limits]\nmachins = 3\n", &["machins"][..]),
        ("lissten = \"127.0.0.1:80\"\n", &["lissten"][..]),
        ("listen = 8080\n", &["listen"][..]),
        ("data_dir = \"\"\n", &["data_dir"][..]),
        ("limits = 3\n", &["limits"][..]),
    ] {
        fs::write(&file, content).unwrap();
        let text = refusal(&flags, &host(dir.path(), &[]));
        for part in parts.iter().copied().chain([file.to_str().unwrap()]) {
            assert!(text.contains(part), "{content:?}: `{text}` lacks `{part}`");
        }
    }
    fs::write(&file, "listen = \n").unwrap();
    assert!(
        matches!(load(&flags, &host(dir.path(), &[])), Err(Error::Config { path, .. }) if path == file)
    );
    let missing = Flags {
        config: Some(dir.path().join("none.toml")),
        ..Flags::default()
    };
    assert!(refusal(&missing, &host(dir.path(), &[])).contains("none.toml"));
}

#[test]
fn without_a_home_a_place_must_be_named() {
    let mut homeless = host(Path::new("/nowhere"), &[]);
    homeless.environment.clear();
    let error = load(&Flags::default(), &homeless)
        .map(|loaded| loaded.config)
        .unwrap_err();
    assert!(error.hint().unwrap().contains("HUTCH_DATA_DIR"));
    homeless.environment = vec![
        ("DATA_DIR".into(), "/d".into()),
        ("HUTCH_CACHE_DIR".into(), "/c".into()),
    ];
    assert_eq!(
        load(&Flags::default(), &homeless).unwrap().config.cache_dir,
        Path::new("/c")
    );
}

#[test]
fn a_directory_too_deep_for_a_socket_is_refused_at_once() {
    let deep = format!("/{}", "d".repeat(100));
    let text = refusal(
        &Flags::default(),
        &host(Path::new("/nowhere"), &[("DATA_DIR", &deep)]),
    );
    assert!(
        text.contains("data_dir") && text.contains("107") && text.contains("DATA_DIR"),
        "{text}"
    );
}

#[test]
fn machines_are_reached_on_this_host_alone_as_long_as_the_api_is() {
    let here = loaded(&[]).config.gateway;
    assert_eq!(
        here.http_listen,
        HttpListen(Some("127.0.0.1:8081".parse().unwrap()))
    );
    assert!(here.ports_bind.is_loopback() && !here.chosen);
    let open = loaded(&[("HUTCH_LISTEN", "0.0.0.0:8080")]).config.gateway;
    assert!(open.ports_bind.is_unspecified());
    let told = [
        ("HUTCH_LISTEN", "0.0.0.0:8080"),
        ("HUTCH_GATEWAY_PORTS_BIND", "192.0.2.1"),
        ("HUTCH_HTTP_LISTEN", "off"),
        ("PORT_MIN", "3000"),
        ("PORT_MAX", "3010"),
    ];
    let told = loaded(&told);
    assert!(told.unknown_variables.is_empty());
    let gateway = told.config.gateway;
    assert_eq!(gateway.ports_bind.to_string(), "192.0.2.1");
    assert!(gateway.chosen && gateway.http_listen == HttpListen(None));
    let reach = gateway.reach(None);
    assert_eq!(reach.ports, 3000..=3010);
    assert!(reach.urls.is_none());
}

#[test]
fn urls_are_written_as_the_outermost_proxy_has_them() {
    let url = |variables: &[(&str, &str)], port| {
        let urls = loaded(variables).config.gateway.reach(port).urls;
        urls.map(|urls| urls.of("web", Some(3000)))
    };
    let of = |text: &str| Some(text.to_owned());
    assert_eq!(
        url(&[], Some(8081)),
        of("http://3000-web.vms.localhost:8081")
    );
    assert_eq!(url(&[], Some(80)), of("http://3000-web.vms.localhost"));
    assert_eq!(url(&[], None), None);
    let proxied = [
        ("BASE_DOMAIN", "VMs.Example.net."),
        ("HUTCH_GATEWAY_URL_SCHEME", "https"),
    ];
    assert_eq!(url(&proxied, None), of("https://3000-web.vms.example.net"));
    let caddy = [("HUTCH_GATEWAY_CADDY", "own")];
    assert_eq!(
        url(&caddy, Some(8081)),
        of("https://3000-web.vms.localhost")
    );
    let elsewhere = [caddy[0], ("HUTCH_GATEWAY_HTTPS_PORT", "8443")];
    assert_eq!(
        url(&elsewhere, None),
        of("https://3000-web.vms.localhost:8443")
    );
    let told = [
        elsewhere[0],
        elsewhere[1],
        ("HUTCH_GATEWAY_URL_SCHEME", "http"),
    ];
    assert_eq!(
        url(&told, Some(8081)),
        of("http://3000-web.vms.localhost:8081")
    );
    let odd = [("HUTCH_GATEWAY_URL_PORT", "8443"), proxied[1]];
    assert_eq!(
        url(&odd, Some(8081)),
        of("https://3000-web.vms.localhost:8443")
    );
}

#[test]
fn a_gateway_that_cannot_be_meant_is_refused_by_name() {
    for (variable, value, key) in [
        ("HUTCH_HTTP_LISTEN", "8081", "gateway.http_listen"),
        ("BASE_DOMAIN", "vms localhost", "gateway.domain"),
        ("BASE_DOMAIN", "*.example.net", "gateway.domain"),
        ("HUTCH_GATEWAY_URL_SCHEME", "ftp", "gateway.url_scheme"),
        (
            "HUTCH_GATEWAY_PORTS_BIND",
            "localhost",
            "gateway.ports_bind",
        ),
        ("PORT_MIN", "0", "gateway.port_min"),
        ("HUTCH_GATEWAY_CADDY", "on", "gateway.caddy"),
        ("HUTCH_GATEWAY_HTTPS_PORT", "0", "gateway.https_port"),
        (
            "HUTCH_GATEWAY_CADDY_ADMIN",
            "http://localhost:2019",
            "gateway.caddy_admin",
        ),
        (
            "HUTCH_GATEWAY_CADDY_DNS_PROVIDER",
            "{\"api_token\": \"x\"}",
            "gateway.caddy_dns_provider",
        ),
        ("PORT_MIN", "40000", "gateway.port_min"),
    ] {
        let home = host(Path::new("/nowhere"), &[(variable, value)]);
        let text = refusal(&Flags::default(), &home);
        assert!(text.contains(key) && text.contains(variable), "{text}");
    }
}

#[test]
fn a_relative_directory_is_taken_from_here_once_and_for_all() {
    let flags = Flags {
        data_dir: Some("some/dir".into()),
        ..Flags::default()
    };
    let config = load(&flags, &host(Path::new("/nowhere"), &[]))
        .unwrap()
        .config;
    assert_eq!(
        config.data_dir,
        std::env::current_dir().unwrap().join("some/dir")
    );
}
