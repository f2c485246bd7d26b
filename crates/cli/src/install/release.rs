//! Which releases there are: their places, names and checksums.

use reqwest::Url;

use super::Error;

/// A runtime whose program its makers release.
#[derive(Debug)]
pub struct Release {
    /// The runtime.
    pub name: &'static str,
    /// The version that is installed when none is asked for.
    pub version: &'static str,
    /// Below it are the versions, as GitHub has them.
    base: &'static str,
    layout: Layout,
    /// sha256 of the file of [`version`](Self::version), by processor as of [`std::env::consts::ARCH`].
    sums: [(&'static str, &'static str); 2],
}

#[derive(Debug)]
enum Layout {
    /// `NAME-vVERSION-ARCH.tgz` with `release-vVERSION-ARCH/PROGRAM-vVERSION-ARCH`, and its checksum in
    /// `….tgz.sha256.txt` (Firecracker, `tools/release.sh`).
    Archive(&'static [&'static str]),
    /// The program itself, with a name of its own for aarch64, and no file of checksums (Cloud Hypervisor,
    /// `.github/workflows/release.yaml`).
    Program {
        x86_64: &'static str,
        aarch64: &'static str,
    },
}

const RELEASES: [Release; 2] = [
    Release {
        name: "firecracker",
        version: "1.16.1",
        base: "https://github.com/firecracker-microvm/firecracker/releases/download",
        layout: Layout::Archive(&["firecracker", "jailer"]),
        sums: [
            (
                "x86_64",
                "382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6",
            ),
            (
                "aarch64",
                "8d0e69f6d6f9a1724551f607f18504052c16c1828ee3d4d7b6e6c73380871e0e",
            ),
        ],
    },
    Release {
        name: "cloud-hypervisor",
        version: "53.0",
        base: "https://github.com/cloud-hypervisor/cloud-hypervisor/releases/download",
        layout: Layout::Program {
            x86_64: "cloud-hypervisor-static",
            aarch64: "cloud-hypervisor-static-aarch64",
        },
        sums: [
            (
                "x86_64",
                "448af3d4e59b22c2987f7df94c213ad40fb53a10d437e42b5ee6c4fce7c29ecc",
            ),
            (
                "aarch64",
                "f192b510eea1c710cbc439d716bb0573c223fc463dbe3e6523788a2b7ef62850",
            ),
        ],
    },
];

/// All of them.
pub fn known() -> impl Iterator<Item = &'static Release> {
    RELEASES.iter()
}

/// One file of a release.
#[derive(Debug)]
pub(super) struct File {
    pub(super) version: String,
    /// Its name.
    pub(super) asset: String,
    pub(super) url: Url,
    /// Where its makers publish its checksum.
    pub(super) sums: Option<Url>,
    /// The checksum that we know.
    pub(super) sha256: Option<&'static str>,
    pub(super) form: Form,
}

/// What a file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The program of that name.
    Program(&'static str),
    /// A tar, packed by gzip, with these members as these programs.
    Archive(Vec<(String, &'static str)>),
}

impl Release {
    /// The release for a runtime.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn of(name: &str) -> Result<&'static Release, Error> {
        let found = RELEASES.iter().find(|release| release.name == name);
        found.ok_or_else(|| Error::Unknown {
            name: name.to_owned(),
        })
    }

    /// The file to install for a version and a processor.
    pub(super) fn file(
        &self,
        version: Option<&str>,
        arch: &'static str,
        from: Option<&str>,
    ) -> Result<File, Error> {
        let sum = self.sums.iter().find(|(of, _)| *of == arch);
        let &(_, sum) = sum.ok_or(Error::Processor {
            name: self.name,
            arch,
        })?;
        let version = version.unwrap_or(self.version);
        let version = version.strip_prefix('v').unwrap_or(version);
        if !is_version(version) {
            return Err(Error::Version {
                version: version.to_owned(),
            });
        }
        let base = from.unwrap_or(self.base);
        let at = |name: &str| {
            let text = format!("{}/v{version}/{name}", base.trim_end_matches('/'));
            let url = Url::parse(&text).ok();
            url.filter(|url| matches!(url.scheme(), "http" | "https"))
                .ok_or_else(|| Error::Address {
                    url: base.to_owned(),
                })
        };
        let (asset, sums, form) = match self.layout {
            Layout::Archive(programs) => {
                let suffix = format!("v{version}-{arch}");
                let asset = format!("{}-{suffix}.tgz", self.name);
                let member = |program| (format!("release-{suffix}/{program}-{suffix}"), program);
                let members = programs.iter().copied().map(member).collect();
                let sums = at(&format!("{asset}.sha256.txt"))?;
                (asset, Some(sums), Form::Archive(members))
            }
            Layout::Program { x86_64, aarch64 } => {
                let asset = if arch == "aarch64" { aarch64 } else { x86_64 };
                (asset.to_owned(), None, Form::Program(self.name))
            }
        };
        Ok(File {
            url: at(&asset)?,
            asset,
            sums,
            sha256: (version == self.version).then_some(sum),
            version: version.to_owned(),
            form,
        })
    }
}

/// It becomes a part of paths and addresses.
fn is_version(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
    text.len() <= 32
        && text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(good)
        && !text.contains("..")
}

/// Whether it is 64 digits, in lower case.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, version: Option<&str>, arch: &'static str) -> File {
        Release::of(name)
            .unwrap()
            .file(version, arch, None)
            .unwrap()
    }

    #[test]
    fn releases_are_called_as_their_makers_call_them() {
        let firecracker = file("firecracker", None, "x86_64");
        assert_eq!(
            firecracker.url.as_str(),
            "https://github.com/firecracker-microvm/firecracker/releases/download/v1.16.1/firecracker-v1.16.1-x86_64.tgz"
        );
        assert!(
            firecracker
                .sums
                .unwrap()
                .as_str()
                .ends_with("/v1.16.1/firecracker-v1.16.1-x86_64.tgz.sha256.txt")
        );
        let member = |program| {
            (
                format!("release-v1.16.1-x86_64/{program}-v1.16.1-x86_64"),
                program,
            )
        };
        assert_eq!(
            firecracker.form,
            Form::Archive(vec![member("firecracker"), member("jailer")])
        );
        let arm = file("firecracker", Some("v1.14.0"), "aarch64");
        assert_eq!(arm.asset, "firecracker-v1.14.0-aarch64.tgz");
        assert_eq!(arm.sha256, None, "known is only the sum of our version");
        for (arch, asset) in [
            ("x86_64", "cloud-hypervisor-static"),
            ("aarch64", "cloud-hypervisor-static-aarch64"),
        ] {
            let program = file("cloud-hypervisor", None, arch);
            assert_eq!(program.asset, asset);
            assert_eq!(program.form, Form::Program("cloud-hypervisor"));
            assert!(program.url.path().ends_with(&format!("/v53.0/{asset}")));
        }
    }

    #[test]
    fn known_sums_are_sums() {
        for release in &RELEASES {
            for (arch, sum) in release.sums {
                assert!(is_sha256(sum), "{} {arch}", release.name);
            }
        }
    }

    #[test]
    fn what_is_no_version_or_address_is_refused() {
        let release = Release::of("firecracker").unwrap();
        for version in ["", "latest", "1.16/../..", "1..2", "1 2", "v", "../1"] {
            let refused = release.file(Some(version), "x86_64", None);
            assert!(matches!(refused, Err(Error::Version { .. })), "{version}");
        }
        for from in ["", "mirror", "file:///tmp", "ftp://x"] {
            let refused = release.file(None, "x86_64", Some(from));
            assert!(matches!(refused, Err(Error::Address { .. })), "{from}");
        }
        let refused = release.file(None, "riscv64", None);
        assert!(matches!(refused, Err(Error::Processor { .. })));
        assert!(matches!(Release::of("qemu"), Err(Error::Unknown { .. })));
    }
}
