//! Numbers of the VMM's threads: it lives in a pid namespace of its own, and containerd wants the host's (proc_pid_status(5), `NSpid`).

use std::{fs, io};

/// The host's number of the VMM's thread that has `local` in its namespace.
pub fn on_host(vmm: u32, local: u32) -> io::Result<u32> {
    for entry in fs::read_dir(format!("/proc/{vmm}/task"))?.flatten() {
        let name = entry.file_name();
        let host = name.to_str().and_then(|name| name.parse::<u32>().ok());
        if let Some(host) = host
            && in_namespace(vmm, host).is_ok_and(|found| found == local)
        {
            return Ok(host);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// The number in its namespace of the VMM's thread `host`.
pub fn in_namespace(vmm: u32, host: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{vmm}/task/{host}/status"))?;
    parse(&status).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The innermost namespace's is the last.
fn parse(status: &str) -> Option<u32> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_of_this_process_has_its_own_number() {
        let (pid, tid) = (std::process::id(), rustix::thread::gettid());
        let tid = tid.as_raw_nonzero().get().unsigned_abs();
        assert_eq!(in_namespace(pid, tid).unwrap(), tid);
        assert_eq!(on_host(pid, tid).unwrap(), tid);
        assert!(on_host(pid, u32::MAX).is_err());
    }

    #[test]
    fn of_several_namespaces_the_innermost_counts() {
        assert_eq!(parse("Name:\tx\nNSpid:\t4711\t12\t3\n"), Some(3));
        assert_eq!(parse("Name:\tNSpid: 3\n"), None);
    }
}
