//! Threads of a jailed process. A thread inherits the filters of the one that starts it, so all are started by one that has the process's
//! alone (it never meets a byte of the guest), and put on their own first; no other may make threads.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use super::seccomp::{self, Kind};

type Job = Box<dyn FnOnce() + Send>;

static JAIL: OnceLock<Jail> = OnceLock::new();

struct Jail {
    starter: Sender<Job>,
    filtered: bool,
}

/// From now on threads are started by one, and `filtered` says whether they are confined.
pub fn begin(filtered: bool) -> io::Result<()> {
    let (starter, jobs) = channel();
    Builder::new()
        .name("threads".into())
        .spawn(move || start(&jobs))?;
    // Twice is nobody's business: the first stays.
    let _ = JAIL.set(Jail { starter, filtered });
    Ok(())
}

/// One heap for all threads: glibc opens files of /proc when it trims the heap of a thread, and each takes memory.
pub fn one_heap() {
    // SAFETY: it only sets a number; there is one thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn start(jobs: &Receiver<Job>) {
    for job in jobs {
        job();
    }
}

/// Confines the calling thread, which waits for the machine's end.
pub fn confine_main() {
    if JAIL.get().is_some_and(|jail| jail.filtered) {
        seccomp::confine(Kind::Main);
    }
}

/// Starts a thread of a kind; outside the jail (tests) without a filter.
pub fn spawn<T: Send + 'static>(
    kind: Kind,
    builder: Builder,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let Some(jail) = JAIL.get() else {
        return builder.spawn(body);
    };
    let filtered = jail.filtered;
    let (tell, told) = channel();
    let job = Box::new(move || {
        let thread = builder.spawn(move || {
            if filtered {
                seccomp::confine(kind);
            }
            body()
        });
        // Who asked waits for it.
        let _ = tell.send(thread);
    });
    let gone = || io::Error::other("the thread that starts threads is gone");
    jail.starter.send(job).map_err(|_| gone())?;
    told.recv().map_err(|_| gone())?
}
