//! The machine at rest: while every container of the pod is paused, its vCPUs are stopped.
//!
//! Whoever needs the agent holds an [`Awake`]: the vCPUs run while there is one, and stop again after the last if the pod is
//! still quiet. Calls that only wait for the guest (the end of a process, ports that listen) hold none: they wait on.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::Mutex;

use super::control;

/// See the module.
pub struct Rest {
    control: control::Client,
    awake: AtomicUsize,
    quiet: AtomicBool,
    /// Whether the vCPUs are stopped; held while that changes.
    stopped: Mutex<bool>,
}

/// The vCPUs run while it lives.
pub struct Awake(Arc<Rest>);

impl Rest {
    /// Of a machine whose vCPUs run.
    pub fn new(control: control::Client) -> Arc<Self> {
        Arc::new(Self {
            control,
            awake: AtomicUsize::new(0),
            quiet: AtomicBool::new(false),
            stopped: Mutex::new(false),
        })
    }

    /// The machine was taken over: its vCPUs may be stopped.
    pub fn doubt(&self) {
        if let Ok(mut stopped) = self.stopped.try_lock() {
            *stopped = true;
        }
    }

    /// Whether nothing in the pod can run: every container is paused. It counts when nobody is [`Awake`].
    pub fn set_quiet(&self, quiet: bool) {
        self.quiet.store(quiet, Ordering::SeqCst);
    }

    /// Lets the vCPUs run.
    pub async fn wake(self: &Arc<Self>) -> Awake {
        // Counted first: a rest that begins now is seen by the lock.
        self.awake.fetch_add(1, Ordering::SeqCst);
        let awake = Awake(self.clone());
        let mut stopped = self.stopped.lock().await;
        if *stopped {
            match self.request("resume").await {
                Ok(()) => *stopped = false,
                Err(error) => tracing::warn!(%error, "the machine's vCPUs stay stopped"),
            }
        }
        awake
    }

    async fn settle(&self) {
        let mut stopped = self.stopped.lock().await;
        let rests = self.awake.load(Ordering::SeqCst) == 0 && self.quiet.load(Ordering::SeqCst);
        if rests && !*stopped {
            match self.request("pause").await {
                Ok(()) => *stopped = true,
                Err(error) => tracing::warn!(%error, "the machine's vCPUs are not stopped"),
            }
        }
    }

    async fn request(&self, op: &str) -> Result<(), control::Error> {
        let answer = self.control.request(control::op(op), Vec::new()).await;
        answer.map(drop)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        let last = self.0.awake.fetch_sub(1, Ordering::SeqCst) == 1;
        if last
            && self.0.quiet.load(Ordering::SeqCst)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let rest = self.0.clone();
            runtime.spawn(async move { rest.settle().await });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixListener,
        sync::mpsc::{Receiver, channel},
        time::Duration,
    };

    use super::*;

    /// A VMM that says yes, and what it was asked.
    fn vmm() -> (tempfile::TempDir, Arc<Rest>, Receiver<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (asked, answers) = channel();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let Ok(line) = line else { return };
                let op: serde_json::Value = serde_json::from_str(&line).unwrap();
                asked.send(op["op"].as_str().unwrap().to_owned()).unwrap();
                writeln!(&stream, "{{\"ok\":{{}}}}").unwrap();
            }
        });
        (dir, Rest::new(control::Client::new(path)), answers)
    }

    async fn next(asked: &Receiver<String>) -> Option<String> {
        for _ in 0..200 {
            if let Ok(op) = asked.try_recv() {
                return Some(op);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        None
    }

    #[tokio::test]
    async fn a_quiet_pod_rests_after_the_last_call_and_wakes_for_the_next() {
        let (_dir, rest, asked) = vmm();
        let (one, two) = (rest.wake().await, rest.wake().await);
        rest.set_quiet(true);
        drop(one);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(asked.try_recv().is_err());
        drop(two);
        assert_eq!(next(&asked).await.as_deref(), Some("pause"));
        let call = rest.wake().await;
        assert_eq!(asked.try_recv().as_deref(), Ok("resume"));
        drop(call);
        assert_eq!(next(&asked).await.as_deref(), Some("pause"));
        let call = rest.wake().await;
        assert_eq!(asked.try_recv().as_deref(), Ok("resume"));
        rest.set_quiet(false);
        drop(call);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(asked.try_recv().is_err());
    }
}
