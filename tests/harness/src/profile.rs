//! What containerd's profiler tells of it on its debug socket (Go's `net/http/pprof`): the goroutines, and the heap without
//! garbage.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use crate::failure::{Context, Outcome};

/// The socket's name beside containerd's own.
pub const SOCKET: &str = "debug.sock";
/// containerd answers at once or never; on an emulated host that takes a while.
const LIMIT: Duration = Duration::from_secs(30);
/// The profiler's own goroutine, which is there because it is asked.
const PROFILER: &str = "net/http.";

/// The function that each goroutine began with.
pub fn goroutines(socket: &Path) -> Outcome<Vec<String>> {
    Ok(begun(&get(socket, "goroutine?debug=1")?))
}

/// Bytes of the heap that are in use, after a collection.
pub fn heap(socket: &Path) -> Outcome<u64> {
    let text = get(socket, "heap?debug=1&gc=1")?;
    let mut lines = text.lines();
    lines
        .find_map(|line| line.strip_prefix("# HeapAlloc = ")?.parse().ok())
        .context("no HeapAlloc in containerd's profile")
}

fn get(socket: &Path, profile: &str) -> Outcome<String> {
    let what = format!("containerd's profile by {}", socket.display());
    let mut stream = UnixStream::connect(socket).context(&what)?;
    stream.set_read_timeout(Some(LIMIT)).context(&what)?;
    // HTTP/1.0: the answer ends with the connection and comes in one piece.
    write!(stream, "GET /debug/pprof/{profile} HTTP/1.0\r\n\r\n").context(&what)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context(&what)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context(&what)?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => Err(format!("{what}: {head}").into()),
    }
}

/// Each stack has a line with its count, and one a function, the first one called last.
fn begun(profile: &str) -> Vec<String> {
    let mut begun = Vec::new();
    for stack in profile.split("\n\n") {
        let count = stack
            .lines()
            .find_map(|line| line.split_once(" @ ")?.0.parse().ok());
        let first = stack.lines().rfind(|line| line.starts_with("#\t"));
        let first = first.and_then(|line| line.split('\t').nth(2));
        let function = first
            .and_then(|name| name.rsplit_once('+'))
            .map(|(name, _)| name);
        if let (Some(count), Some(function)) = (count, function)
            && !function.starts_with(PROFILER)
        {
            begun.extend(std::iter::repeat_n(function.to_owned(), count));
        }
    }
    begun
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goroutines_are_told_by_the_function_they_began_with() {
        let profile = "goroutine profile: total 4\n\
            2 @ 0xc6be74 0xccd92f\n\
            #\t0xccd92e\tos/signal.signal_recv+0x2e\truntime/sigqueue.go:152\n\
            #\t0x13d9478\tos/signal.loop+0x18\t\tos/signal/signal_unix.go:23\n\
            \n\
            1 @ 0xc92996\n\
            #\t0x119d286\tnet/http.(*conn).serve+0x606\tnet/http/server.go:1991\n\
            \n\
            1 @ 0xc92996 labels\n\
            #\t0x119d286\tmain.main.func1+0x1\tmain.go:1\n";
        assert_eq!(
            begun(profile),
            ["os/signal.loop", "os/signal.loop", "main.main.func1"]
        );
    }
}
