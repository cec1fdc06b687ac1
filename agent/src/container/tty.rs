//! Step: the terminal. The pty is of the container's own devpts; the slave becomes the process's standard streams, the master goes
//! to the agent.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    pty::OpenptFlags,
    termios::Winsize,
};

use super::{
    mounts::{attach, clone_tree},
    path::{PointKind, make_in_root, open_in_root},
};
use crate::error::{Context, Result};

/// A pty pair.
pub struct Pty {
    /// For the agent.
    pub master: OwnedFd,
    slave: OwnedFd,
}

impl Pty {
    /// Opens a pty of the devpts mounted in `root`; with its size, if given as (width, height).
    pub fn open(root: BorrowedFd<'_>, size: Option<(u64, u64)>) -> Result<Self> {
        let master = open_in_root(
            root,
            Path::new("/dev/pts/ptmx"),
            OFlags::RDWR | OFlags::NOCTTY,
        )
        .step(|| "process.terminal: open /dev/pts/ptmx".into())?;
        rustix::pty::unlockpt(&master).step(|| "process.terminal: unlock the pty".into())?;
        let slave = rustix::pty::ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )
        .step(|| "process.terminal: open the pty's slave".into())?;
        if let Some((width, height)) = size {
            let size = winsize(width, height);
            rustix::termios::tcsetwinsize(&master, size)
                .step(|| "process.consoleSize: set".into())?;
        }
        Ok(Self { master, slave })
    }

    /// Both ends: the master, then the slave.
    pub fn into_parts(self) -> (OwnedFd, OwnedFd) {
        (self.master, self.slave)
    }

    /// Binds the slave over `/dev/console`, as an init expects it.
    pub fn bind_console(&self, root: BorrowedFd<'_>) -> Result<()> {
        let what = || "process.terminal: bind /dev/console".to_string();
        let point =
            make_in_root(root, Path::new("/dev/console"), PointKind::File, 0o600).step(what)?;
        // The slave's own descriptor says where it is mounted.
        let tree = clone_tree(&self.slave, Path::new(""), false)
            .or_else(|_| {
                let name = rustix::pty::ptsname(&self.master, Vec::new())?;
                let path = name.into_string().map_err(|_| rustix::io::Errno::ILSEQ)?;
                let node = open_in_root(root, Path::new(&path), OFlags::PATH)?;
                clone_tree(&node, Path::new(""), false)
            })
            .step(what)?;
        attach(&tree, &point).step(what)
    }

    /// Makes the slave the controlling terminal and the standard streams; answers the master. The caller is a
    /// session leader without terminal.
    pub fn become_stdio(self) -> Result<OwnedFd> {
        let what = || "process.terminal: take the pty".to_string();
        rustix::process::ioctl_tiocsctty(&self.slave).step(what)?;
        rustix::stdio::dup2_stdin(&self.slave).step(what)?;
        rustix::stdio::dup2_stdout(&self.slave).step(what)?;
        rustix::stdio::dup2_stderr(&self.slave).step(what)?;
        Ok(self.master)
    }
}

/// A size for the kernel, capped at what its fields hold.
pub fn winsize(width: u64, height: u64) -> Winsize {
    Winsize {
        ws_col: u16::try_from(width).unwrap_or(u16::MAX),
        ws_row: u16::try_from(height).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Opens the root folder of the calling process.
pub fn own_root() -> Result<OwnedFd> {
    rustix::fs::openat(
        CWD,
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(|| "open the root folder".into())
    .inspect(|root| debug_assert!(root.as_fd().try_clone_to_owned().is_ok()))
}
