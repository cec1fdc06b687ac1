//! Ids of containers and execs: they become folder and cgroup names, so they are checked on both sides.

use crate::limits::ID_MAX;

/// Whether `id` may name a container or an exec: letters, digits, `.`, `_`, `-`, beginning with a letter or a
/// digit (so neither `..` nor a path), at most [`ID_MAX`] bytes.
pub fn is_valid(id: &str) -> bool {
    id.len() <= ID_MAX
        && id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_containerd_are_valid() {
        for id in ["a", "web-1", "k8s_pod.2", "0123456789abcdef"] {
            assert!(is_valid(id), "{id}");
        }
    }

    #[test]
    fn paths_dots_and_long_ids_are_not() {
        let long = "a".repeat(ID_MAX + 1);
        for id in [
            "", ".", "..", "a/b", "../x", "-a", ".a", "a b", "a\0", "é", &long,
        ] {
            assert!(!is_valid(id), "{id}");
        }
    }
}
