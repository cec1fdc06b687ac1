//! What a person needs who reads a failure: logs of containerd, shims and pods.

use std::fs;

use super::Suite;
use crate::{command::tail, failure::read};

impl Suite {
    /// Keeps the logs in the state folders, which are about to go.
    pub fn save_logs(&self) {
        let mut text = self.saved.borrow_mut();
        for entry in fs::read_dir(self.state()).into_iter().flatten().flatten() {
            for file in ["vmm.log", "fs.log", "exit.json"] {
                let path = entry.path().join(file);
                let body = read(&path).unwrap_or_default().replace("\\n", "\n");
                add_log(&mut text, &path.to_string_lossy(), &body);
            }
        }
    }

    /// The ends of every log since `since`: what a person needs who reads a failure.
    pub fn logs(&self, since: usize) -> String {
        self.save_logs();
        let mut text = self.saved.take();
        if let Ok(body) = read(self.run.join("main/containerd.log")) {
            let body = body.get(since..).unwrap_or(&body);
            add_log(&mut text, "containerd and shims", body);
        }
        text
    }

    /// Drops what [`save_logs`](Self::save_logs) kept.
    pub fn forget_logs(&self) {
        self.saved.take();
    }

    /// Length of containerd's log, for [`logs`](Self::logs).
    pub fn log_mark(&self) -> usize {
        fs::metadata(self.run.join("main/containerd.log"))
            .ok()
            .and_then(|m| usize::try_from(m.len()).ok())
            .unwrap_or(0)
    }
}

fn add_log(text: &mut String, title: &str, body: &str) {
    if !body.trim().is_empty() {
        text.push_str(&format!("--- {title}\n{}\n", tail(body, 3000).trim_end()));
    }
}
