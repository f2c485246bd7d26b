//! Whole servers, in this process, spoken to over their sockets: start and end, connections, and machines of the stub
//! runtime through the API's own client.

#![expect(clippy::unwrap_used, reason = "tests")]

mod connections;
mod files;
mod lifecycle;
mod machines;
mod processes;

use std::path::{Path, PathBuf};

use hutch_contract::client::{Client, Target};
use hutch_server::{Config, Error, Flags, Host, Running, Server, config};

/// A place for one server, gone with the test.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Home {
        Home(tempfile::tempdir().unwrap())
    }

    fn data_dir(&self) -> PathBuf {
        self.0.path().join("data")
    }

    /// A configuration for this place, on a port that the system chooses, with these variables besides.
    fn config(&self, variables: &[(&str, &str)]) -> Config {
        let programs = programs();
        let at = |path: &str| programs.join(path).to_str().unwrap().to_owned();
        let fixed = [
            ("HOME", self.0.path().to_str().unwrap().to_owned()),
            ("HUTCH_LISTEN", "127.0.0.1:0".to_owned()),
            ("HUTCH_HTTP_LISTEN", "127.0.0.1:0".to_owned()),
            // Nothing here boots a kernel, and none must be downloaded.
            ("HUTCH_KERNEL", "/nowhere/kernel.deb".to_owned()),
            ("HUTCH_RUNTIME_PROGRAMS_STUB", at("hutch-stub-vmm")),
            // The host's own network is left alone.
            ("HUTCH_NETWORK_MODE", "none".to_owned()),
            // Nor is anything mounted on it.
            ("HUTCH_DISK_POOL", "off".to_owned()),
            ("HUTCH_LIMITS_DISK_RESERVE_MIB", "0".to_owned()),
        ];
        let fixed = fixed.iter().map(|(name, value)| (*name, value.as_str()));
        let environment = fixed.chain(variables.iter().copied());
        let host = Host {
            root: false,
            executable: programs.join("hutch"),
            environment: environment
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        };
        let flags = Flags {
            data_dir: Some(self.data_dir()),
            ..Flags::default()
        };
        config::load(&flags, &host).unwrap().config
    }

    /// A directory that machines can reach too, whoever they run as: the stub's guests see the host's files.
    fn shared(&self) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let open = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let dir = self.0.path().join("shared");
        std::fs::create_dir(&dir).unwrap();
        open(self.0.path(), 0o711);
        open(&dir, 0o777);
        dir
    }

    async fn start(&self) -> Running {
        Server::start(self.config(&[])).await.unwrap()
    }

    /// Why a server does not start.
    async fn refusal(&self, variables: &[(&str, &str)]) -> Error {
        match Server::start(self.config(variables)).await {
            Ok(_) => panic!("it started"),
            Err(error) => error,
        }
    }

    fn admin_key(&self) -> String {
        std::fs::read_to_string(self.data_dir().join("admin.key"))
            .unwrap()
            .trim()
            .to_owned()
    }
}

/// A test that fails leaves machines behind: whatever works in this place is ended with it.
impl Drop for Home {
    fn drop(&mut self) {
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let cwd = std::fs::read_link(process.path().join("cwd"));
            let pid = process
                .file_name()
                .to_str()
                .and_then(|pid| pid.parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw)
                && cwd.is_ok_and(|cwd| cwd.starts_with(self.0.path()))
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Where the programs of this build are.
fn programs() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().to_owned()
}

fn by_tcp(running: &Running) -> Client {
    Client::new(Target::Url(format!("http://{}", running.addr()))).unwrap()
}

fn by_socket(socket: &Path) -> Client {
    Client::new(Target::Unix(socket.to_owned())).unwrap()
}

/// What a request with a key is answered with, as text.
async fn plain_get(running: &Running, key: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(running.addr())
        .await
        .unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
