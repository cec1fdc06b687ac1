//! The layers of the jail that this host has, and the users that pods run as.

use std::{fs, ops::Range};

use super::{Item, Stops, host, item};
use crate::config::{Jail, JailLayer};

/// What the host's kernel gives the jail.
pub fn layers() -> Vec<Item> {
    let seccomp = host::has_seccomp()
        .then(|| "filters can be installed".to_owned())
        .ok_or((
            "the kernel has no seccomp filters".to_owned(),
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ));
    let landlock = host::landlock_abi().map(|abi| format!("ABI {abi}")).ok_or((
        "not enabled: the jails have one wall less".to_owned(),
        "boot with lsm=landlock,... (Linux 5.13 or newer)",
    ));
    let user_namespaces = host::has_user_namespaces()
        .then(|| "the file server has a user namespace of its own".to_owned())
        .ok_or((
            "no user namespaces: the file server's rights are in the host's".to_owned(),
            "set user.max_user_namespaces above 0",
        ));
    vec![
        item("seccomp", Stops::Host, seccomp),
        item("landlock", Stops::Host, landlock).or_warn(),
        item("namespaces", Stops::Host, user_namespaces).or_warn(),
    ]
}

/// The table `jail` of the configuration: whether the host has what it requires, and whether its users are nobody else's.
pub fn configured(jail: &Jail) -> Vec<Item> {
    let users = u64::from(jail.first_uid)..u64::from(jail.first_uid) + u64::from(jail.uids);
    let text = format!("pods run as users {} to {}", users.start, users.end - 1);
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let others = owner(&users, &read("/etc/passwd"), &read("/etc/subuid"));
    let owned = match others {
        None => Ok(text),
        Some(owner) => Err((
            format!("{text}, some of which are {owner}"),
            "choose numbers that are nobody's: [jail] first_uid and uids in the configuration",
        )),
    };
    let mut items = vec![item("pods' users", Stops::Installed, owned).or_warn()];
    if jail.require.contains(&JailLayer::Landlock) && host::landlock_abi().is_none() {
        items.push(item(
            "jail",
            Stops::Installed,
            Err((
                "[jail] require names landlock, which this host lacks: no pod starts".into(),
                "boot with lsm=landlock,..., or take it out of require",
            )),
        ));
    }
    items
}

/// Who else has a user of `users`, by the texts of passwd(5) and subuid(5).
fn owner(users: &Range<u64>, passwd: &str, subuid: &str) -> Option<String> {
    let account = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?.parse().ok()?);
        users
            .contains(&uid)
            .then(|| format!("{name}'s in /etc/passwd"))
    });
    account.or_else(|| {
        subuid.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let (first, count): (u64, u64) =
                (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let apart = first >= users.end || first.saturating_add(count) <= users.start;
            (!apart && count != 0).then(|| format!("{name}'s in /etc/subuid"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_of_the_pods_users_are_named() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbad line\nmany:x:1500:1:::\n";
        let subuid = "many:100000:65536\nnobody:x:1\nempty:5:0\n";
        let owner = |users| owner(&users, passwd, subuid);
        assert_eq!(owner(1..1500), None);
        assert_eq!(owner(0..1).unwrap(), "root's in /etc/passwd");
        assert_eq!(owner(1400..1501).unwrap(), "many's in /etc/passwd");
        assert_eq!(owner(99_000..100_000), None);
        assert_eq!(owner(99_000..100_001).unwrap(), "many's in /etc/subuid");
        assert_eq!(owner(165_535..165_536).unwrap(), "many's in /etc/subuid");
        assert_eq!(owner(165_536..200_000), None);
    }
}
