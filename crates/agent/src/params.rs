//! Parameters: `hutch.*` of the kernel's command line and the arguments of the program. Pure parsing.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Where the host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channel {
    /// The virtio-serial port of this name, under the link layer.
    VirtioSerial(String),
    /// Listen on this vsock port.
    Vsock(u32),
    /// Listen on this unix socket.
    Unix(PathBuf),
    /// This serial line, under the link layer.
    Uart(PathBuf),
    /// Listen on this inherited unix socket.
    Inherited(RawFd),
}

impl FromStr for Channel {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || Error::Parameter {
            name: "hutch.channel",
            value: text.to_owned(),
            allowed: "virtio-serial:NAME, vsock:PORT, unix:PATH, uart:PATH",
        };
        let (kind, value) = text.split_once(':').ok_or_else(refuse)?;
        match kind {
            _ if value.is_empty() => Err(refuse()),
            "virtio-serial" => Ok(Self::VirtioSerial(value.to_owned())),
            "vsock" => Ok(Self::Vsock(value.parse().map_err(|_| refuse())?)),
            "unix" => Ok(Self::Unix(value.into())),
            "uart" => Ok(Self::Uart(value.into())),
            _ => Err(refuse()),
        }
    }
}

/// How a disk is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    /// The virtio block device with this serial.
    Serial(String),
    /// A device node.
    Node(PathBuf),
}

impl Disk {
    fn parse(name: &'static str, text: &str) -> Result<Self> {
        if let Some(serial) = text.strip_prefix("serial:").filter(|s| !s.is_empty()) {
            return Ok(Self::Serial(serial.to_owned()));
        }
        if text.starts_with("/dev/") {
            return Ok(Self::Node(text.into()));
        }
        Err(Error::Parameter {
            name,
            value: text.to_owned(),
            allowed: "serial:NAME, /dev/NODE",
        })
    }
}

/// What the kernel's command line says to PID 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// `hutch.channel`.
    pub channel: Channel,
    /// `hutch.root`; without it serial `root`, else the first virtio disk.
    pub root: Option<Disk>,
    /// `hutch.modules`; without it serial `modules` when there is such a disk.
    pub modules: Option<Disk>,
}

impl Boot {
    /// `hutch.end=reset`: only a reset ends this VMM, so a power-off has to be one too.
    pub fn resets(cmdline: &str) -> bool {
        let mut words = cmdline.split_ascii_whitespace();
        words.any(|word| word == "hutch.end=reset")
    }

    /// Parses `/proc/cmdline`. Parameters without the prefix `hutch.` belong to others.
    ///
    /// # Errors
    /// A value that means nothing, or an unknown parameter of ours: better no boot than a boot that ignores a wish.
    pub fn parse(cmdline: &str) -> Result<Self> {
        let mut boot = Self {
            channel: Channel::VirtioSerial("hutch.agent".to_owned()),
            root: None,
            modules: None,
        };
        for word in cmdline.split_ascii_whitespace() {
            let Some(parameter) = word.strip_prefix("hutch.") else {
                continue;
            };
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            match name {
                "channel" => boot.channel = value.parse()?,
                "root" => boot.root = Some(Disk::parse("hutch.root", value)?),
                "modules" => boot.modules = Some(Disk::parse("hutch.modules", value)?),
                "end" if value == "reset" => {}
                "end" => {
                    return Err(Error::Parameter {
                        name: "hutch.end",
                        value: value.to_owned(),
                        allowed: "reset",
                    });
                }
                "init" if value == "agent" => {}
                "init" => {
                    return Err(Error::Parameter {
                        name: "hutch.init",
                        value: value.to_owned(),
                        allowed: "agent",
                    });
                }
                _ => {
                    return Err(Error::UnknownParameter {
                        word: word.to_owned(),
                        known: "hutch.channel, hutch.root, hutch.modules, hutch.end, hutch.init",
                    });
                }
            }
        }
        Ok(boot)
    }
}

/// What the arguments ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `--version`.
    Version,
    /// `serve`: a plain process on a host.
    Serve(Serve),
    /// `guest`: the child of our PID 1; standard input is the state that outlives it.
    Guest(Channel),
}

/// Arguments of `serve`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// `--unix PATH`, `--fd N` or `--serial PATH`.
    pub channel: Channel,
    /// `--root DIR`: working directory of processes and base of relative paths.
    pub root: Option<PathBuf>,
    /// `--cgroup DIR`: a delegated cgroup v2 directory.
    pub cgroup: Option<PathBuf>,
    /// `--pid-file PATH`.
    pub pid_file: Option<PathBuf>,
    /// `--guest`: the machine is ours, although its PID 1 is not.
    pub guest: bool,
}

/// Printed with usage errors.
pub const USAGE: &str =
    "usage: hutch-agent serve (--unix PATH | --fd N | --serial PATH) [--root DIR] [--cgroup DIR] [--pid-file PATH]
       hutch-agent serve --serial PATH --guest
       hutch-agent --version";

impl Command {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    /// [`Error::Usage`] and wrong values.
    pub fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Self> {
        let first = args.next().and_then(|word| word.into_string().ok());
        match first.as_deref() {
            Some("--version" | "-V") => Ok(Self::Version),
            Some("serve") => Self::serve(args),
            Some("guest") => {
                let channel = args.next().and_then(|word| word.into_string().ok());
                let channel = channel.ok_or(Error::Usage("guest needs a channel"))?;
                Ok(Self::Guest(match channel.strip_prefix("fd:") {
                    Some(_) => return Err(Error::Usage("a guest inherits no channel")),
                    None => channel.parse()?,
                }))
            }
            _ => Err(Error::Usage("no such command")),
        }
    }

    fn serve(mut args: impl Iterator<Item = OsString>) -> Result<Self> {
        let (mut channel, mut root, mut cgroup, mut pid_file) = (None, None, None, None);
        let mut guest = false;
        while let Some(flag) = args.next() {
            if flag == "--guest" {
                guest = true;
                continue;
            }
            let value = args
                .next()
                .ok_or(Error::Usage("an option lacks its value"))?;
            match flag.to_str() {
                Some("--unix") => channel = Some(Channel::Unix(value.into())),
                Some("--fd") => {
                    let fd = value.to_str().and_then(|text| text.parse().ok());
                    let fd = fd.ok_or(Error::Usage("--fd wants a number"))?;
                    channel = Some(Channel::Inherited(fd));
                }
                Some("--serial") => channel = Some(Channel::Uart(value.into())),
                Some("--root") => root = Some(value.into()),
                Some("--cgroup") => cgroup = Some(value.into()),
                Some("--pid-file") => pid_file = Some(value.into()),
                _ => return Err(Error::Usage("no such option")),
            }
        }
        let channel = channel.ok_or(Error::Usage("serve needs --unix, --fd or --serial"))?;
        if guest && (root.is_some() || cgroup.is_some()) {
            return Err(Error::Usage("a guest has its own root and control group"));
        }
        Ok(Self::Serve(Serve {
            guest,
            channel,
            root,
            cgroup,
            pid_file,
        }))
    }
}

impl std::fmt::Display for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::VirtioSerial(name) => write!(f, "virtio-serial:{name}"),
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Uart(path) => write!(f, "uart:{}", path.display()),
            Self::Inherited(fd) => write!(f, "fd:{fd}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_others_are_ignored_and_ours_are_read() {
        let boot = Boot::parse(
            "console=ttyS0 quiet hutch.channel=vsock:1024 root=/dev/sda hutch.root=/dev/vdb hutch.end=reset hutch.init=agent\n",
        )
        .unwrap();
        assert_eq!(boot.channel, Channel::Vsock(1024));
        assert_eq!(boot.root, Some(Disk::Node("/dev/vdb".into())));
        assert_eq!(boot.modules, None);
        let boot = Boot::parse("").unwrap();
        assert_eq!(boot.channel, Channel::VirtioSerial("hutch.agent".into()));
    }

    #[test]
    fn how_a_machine_ends_is_known_even_when_its_parameters_are_refused() {
        assert!(Boot::resets("quiet hutch.end=reset hutch.rooot=x"));
        assert!(!Boot::resets("quiet hutch.end=off hutch.end"));
        assert!(!Boot::resets(""));
    }

    #[test]
    fn wrong_parameters_are_refused_by_name() {
        for bad in [
            "hutch.channel=vsock:x",
            "hutch.channel=vsock:",
            "hutch.channel=tcp:80",
            "hutch.channel",
            "hutch.root=vda",
            "hutch.root=serial:",
            "hutch.init=image",
            "hutch.end=off",
            "hutch.end",
            "hutch.rooot=serial:root",
        ] {
            assert!(Boot::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn channels_print_as_they_parse() {
        for text in [
            "virtio-serial:a.b",
            "vsock:7",
            "unix:/run/x",
            "uart:/dev/ttyS1",
        ] {
            assert_eq!(text.parse::<Channel>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn serve_wants_a_channel() {
        let parse = |words: &[&str]| Command::parse(words.iter().map(OsString::from));
        assert!(parse(&["serve"]).is_err());
        assert!(parse(&["serve", "--unix"]).is_err());
        assert!(parse(&["serve", "--fd", "x"]).is_err());
        assert!(parse(&["guest", "fd:3"]).is_err());
        let Ok(Command::Serve(serve)) = parse(&["serve", "--unix", "/s", "--root", "/r"]) else {
            panic!("serve");
        };
        assert_eq!(serve.channel, Channel::Unix("/s".into()));
        assert_eq!(serve.root, Some("/r".into()));
        assert!(!serve.guest);
        let Ok(Command::Serve(serve)) = parse(&["serve", "--guest", "--serial", "/dev/ttyS0"])
        else {
            panic!("serve");
        };
        assert_eq!(serve.channel, Channel::Uart("/dev/ttyS0".into()));
        assert!(serve.guest);
        assert!(parse(&["serve", "--serial", "/s", "--guest", "--root", "/r"]).is_err());
    }
}
