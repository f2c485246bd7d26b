//! The Docker engine of the tests, which `cargo xtask test` starts: asked by its own command line, so that what the
//! server says about it is not believed.

use std::process::Command;

/// Where it listens.
pub(crate) fn socket() -> Option<String> {
    std::env::var("HUTCH_TEST_DOCKER").ok()
}

fn docker(arguments: &[&str]) -> Vec<String> {
    let socket = socket().expect("a lab of Docker has an engine");
    let output = Command::new("docker")
        .args(["--host", &format!("unix://{socket}")])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "docker {arguments:?}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Process id of the first process of a machine's container.
pub(crate) fn pid(machine: &str) -> i32 {
    let filter = format!("label=hutch.machine={machine}");
    let container = docker(&["ps", "--quiet", "--filter", &filter]).remove(0);
    let pid = docker(&["inspect", "--format", "{{.State.Pid}}", &container]).remove(0);
    pid.parse().unwrap()
}

/// Containers and images that carry a server's tag.
pub(crate) fn all_of(tag: &str) -> Vec<String> {
    let filter = format!("label=hutch.tag={tag}");
    let containers = docker(&["ps", "--all", "--quiet", "--filter", &filter]);
    let images = docker(&["images", "--all", "--quiet", "--filter", &filter]);
    let containers = containers.into_iter().map(|id| format!("container {id}"));
    let images = images.into_iter().map(|id| format!("container image {id}"));
    containers.chain(images).collect()
}

/// Removes all that a server with this tag has made.
pub(crate) fn remove_all(tag: &str) {
    for item in all_of(tag) {
        match item.rsplit_once(' ').expect("a kind and an id") {
            ("container", id) => drop(docker(&["rm", "--force", id])),
            (_, id) => drop(docker(&["rmi", "--force", id])),
        }
    }
}
