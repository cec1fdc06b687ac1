//! The points of a build for tests.

use std::{env, fs, io, sync::OnceLock, time::Duration};

/// The environment variable that names the file: `<point> <mode>`, with the mode `error`, or `kill`, which removes the file first; or
/// `patience little`, for [`patience`].
pub const FILE: &str = "BULKHEAD_FAILPOINT";
/// The kernel's parameter: `<point>:<mode>`.
const PARAMETER: &str = "bulkhead.failpoint=";

struct Set {
    point: String,
    mode: String,
}

impl Set {
    fn load() -> Option<Self> {
        let text = match env::var_os(FILE) {
            Some(file) => fs::read_to_string(file).ok()?,
            None => {
                let line = fs::read_to_string("/proc/cmdline").ok()?;
                let mut words = line.split_whitespace();
                let word = words.find_map(|word| word.strip_prefix(PARAMETER))?;
                word.replace(':', " ")
            }
        };
        let (point, mode) = text.trim().split_once(' ')?;
        Some(Self {
            point: point.into(),
            mode: mode.into(),
        })
    }

    fn get() -> Option<&'static Self> {
        static SET: OnceLock<Option<Set>> = OnceLock::new();
        SET.get_or_init(Self::load).as_ref()
    }
}

/// Passes the point `name`: fails if it is set to `error`, and does not come back if it is set to `kill`.
pub fn reach(name: &'static str) -> io::Result<()> {
    match Set::get() {
        Some(set) if set.point == name => match set.mode.as_str() {
            "error" => Err(io::Error::other(format!("failpoint {name}"))),
            _ => {
                // So that whoever takes over does not die of it, too.
                if let Some(file) = env::var_os(FILE) {
                    let _ = fs::remove_file(file);
                }
                // SAFETY: no memory is touched. The init of a pid namespace takes no signal of its own.
                unsafe {
                    libc::kill(libc::getpid(), libc::SIGKILL);
                    libc::_exit(137)
                }
            }
        },
        _ => Ok(()),
    }
}

/// How long is waited for somebody who may be stuck.
pub fn patience(limit: Duration) -> Duration {
    match Set::get() {
        Some(set) if set.point == "patience" => limit / 10,
        _ => limit,
    }
}

/// What the guest's kernel is told so that its agent knows.
pub fn kernel_parameter() -> String {
    match Set::get() {
        Some(set) if set.point.starts_with("agent.") => {
            format!(" {PARAMETER}{}:{}", set.point, set.mode)
        }
        _ => String::new(),
    }
}
