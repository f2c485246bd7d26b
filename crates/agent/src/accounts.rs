//! Users and groups by `/etc/passwd` and `/etc/group` of this machine, read by ourselves: the agent is static and has
//! no NSS. The files belong to the guest's users, so nothing in them is trusted to be well-formed.

use std::fs::File;
use std::io::Read;

use rustix::process::{Gid, Uid};
use tonic::Status;

use crate::sys::exec::Identity;

/// Files larger than this are read only so far.
const LIMIT: u64 = 1024 * 1024;
/// The kernel's limit of supplementary groups.
const GROUPS: usize = 65536;

/// A user with what a login would set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// For the kernel.
    pub identity: Identity,
    /// Login name; the number when there is none.
    pub name: String,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Looks up `user`, `uid`, `user:group` or `uid:gid`.
///
/// As with `docker run --user`: a number need not exist, and has group 0 then.
///
/// # Errors
/// `NotFound` for names that do not exist.
pub fn find(spec: &str) -> Result<Account, Status> {
    lookup(spec, &read("/etc/passwd"), &read("/etc/group"))
}

/// The account of a user id.
pub fn of_uid(uid: Uid) -> Account {
    let spec = uid.as_raw().to_string();
    lookup(&spec, &read("/etc/passwd"), &read("/etc/group"))
        .unwrap_or_else(|_| Account::nameless(uid.as_raw()))
}

fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        let _ = file.take(LIMIT).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Account {
    fn nameless(uid: u32) -> Self {
        Self {
            identity: Identity {
                uid: Uid::from_raw(uid),
                gid: Gid::ROOT,
                groups: Vec::new(),
            },
            name: uid.to_string(),
            home: if uid == 0 { "/root" } else { "/" }.to_owned(),
            shell: "/bin/sh".to_owned(),
        }
    }
}

/// `name:password:uid:gid:comment:home:shell`
fn parse_user(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = id(fields.nth(1)?)?;
    let gid = id(fields.next()?)?;
    let home = fields.nth(1).filter(|home| home.starts_with('/'));
    let shell = fields.next().filter(|shell| shell.starts_with('/'));
    Some(Account {
        identity: Identity {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: Vec::new(),
        },
        name: name.to_owned(),
        home: home.unwrap_or("/").to_owned(),
        shell: shell.unwrap_or("/bin/sh").to_owned(),
    })
}

/// `name:password:gid:members`
fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = id(fields.nth(1)?)?;
    Some((name, gid, fields.next().unwrap_or("")))
}

/// All ones means "leave as it is" to the kernel and is nobody's id.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

fn lookup(spec: &str, passwd: &str, group: &str) -> Result<Account, Status> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let number = id(user);
    let mut users = passwd.lines().filter_map(parse_user);
    let found =
        users.find(|account| account.name == user || number == Some(account.identity.uid.as_raw()));
    let mut account = match (found, number) {
        (Some(account), _) => account,
        (None, Some(uid)) => Account::nameless(uid),
        (None, None) => return Err(Status::not_found(format!("user {user} not found"))),
    };
    if let Some(wanted) = wanted_group {
        let number = id(wanted);
        let mut groups = group.lines().filter_map(parse_group);
        let found = groups.find(|(name, gid, _)| *name == wanted || number == Some(*gid));
        let gid = found.map(|(_, gid, _)| gid).or(number);
        let gid = gid.ok_or_else(|| Status::not_found(format!("group {wanted} not found")))?;
        account.identity.gid = Gid::from_raw(gid);
    } else {
        let member_of = group
            .lines()
            .filter_map(parse_group)
            .filter(|(_, _, members)| members.split(',').any(|member| member == account.name));
        account.identity.groups = member_of
            .map(|(_, gid, _)| Gid::from_raw(gid))
            .take(GROUPS)
            .collect();
    }
    Ok(account)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        broken line\n::::\nevil:x:4294967295:1::/:/bin/sh\n\
        app:x:1000:1001:An app:/home/app:/bin/zsh\nshort:x:7:8\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,app\nnonsense\napp:x:1001:\nvideo:x:44:app";

    fn ids(spec: &str) -> Option<(u32, u32, Vec<u32>)> {
        let identity = lookup(spec, PASSWD, GROUP).ok()?.identity;
        let groups = identity.groups.iter().map(|gid| gid.as_raw()).collect();
        Some((identity.uid.as_raw(), identity.gid.as_raw(), groups))
    }

    #[test]
    fn names_and_numbers_find_the_same_account() {
        assert_eq!(ids("app"), Some((1000, 1001, vec![10, 44])));
        assert_eq!(ids("1000"), ids("app"));
        let app = lookup("app", PASSWD, GROUP).unwrap();
        assert_eq!(
            (app.home.as_str(), app.shell.as_str()),
            ("/home/app", "/bin/zsh")
        );
    }

    #[test]
    fn an_explicit_group_replaces_all_others() {
        assert_eq!(ids("app:video"), Some((1000, 44, vec![])));
        assert_eq!(ids("app:77"), Some((1000, 77, vec![])));
        assert_eq!(ids("app:nobody"), None);
    }

    #[test]
    fn unknown_numbers_are_taken_and_unknown_names_are_not() {
        assert_eq!(ids("4242"), Some((4242, 0, vec![])));
        for bad in ["nobody", "", ":", "-1", "4294967295", "evil", "99999999999"] {
            assert_eq!(ids(bad), None, "{bad}");
        }
    }

    #[test]
    fn short_lines_get_defaults() {
        let account = lookup("short", PASSWD, GROUP).unwrap();
        assert_eq!(
            (account.home.as_str(), account.shell.as_str()),
            ("/", "/bin/sh")
        );
    }
}
