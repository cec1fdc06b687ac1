//! What is wanted against what is there: the actions, and doing them.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use super::{
    Error, Target,
    diff::diff,
    io_error,
    manifest::{Before, Entry, Kind, Manifest, sha256},
    undo,
    wanted::{Item, Wanted},
};

/// One step.
#[derive(Debug)]
enum Action {
    Folder(PathBuf),
    File {
        path: PathBuf,
        bytes: Vec<u8>,
        mode: u32,
        /// The text that it replaces.
        before: Option<String>,
    },
    Link {
        path: PathBuf,
        to: PathBuf,
    },
    /// Of an older installation, and not wanted any more.
    Remove(Entry),
}

/// The steps of an installation, and its manifest.
#[derive(Debug)]
pub struct Plan {
    actions: Vec<Action>,
    /// What is left as it is, and why.
    left: Vec<String>,
    todo: Vec<String>,
    manifest: Manifest,
}

impl Plan {
    /// Compares. Nothing is changed.
    pub fn new(target: &Target, wanted: Wanted) -> Result<Self, Error> {
        let old = Manifest::load(target)?.unwrap_or_default();
        let mut plan = Self {
            actions: Vec::new(),
            left: Vec::new(),
            todo: wanted.todo,
            manifest: Manifest {
                version: env!("CARGO_PKG_VERSION").into(),
                entries: Vec::new(),
            },
        };
        let paths: Vec<PathBuf> = wanted.items.iter().map(|i| i.path().to_owned()).collect();
        plan.folders(target, &old, &target.lib())?;
        for item in wanted.items {
            plan.item(target, &old, item)?;
        }
        for entry in old.entries {
            if matches!(entry.kind, Kind::Folder) {
                if plan.manifest.entry(&entry.path).is_none() {
                    plan.manifest.entries.insert(0, entry);
                }
            } else if !paths.contains(&entry.path) {
                plan.actions.push(Action::Remove(entry));
            }
        }
        Ok(plan)
    }

    /// The folders above a path, and itself, that are not there or that an older installation made.
    fn folders(&mut self, target: &Target, old: &Manifest, path: &Path) -> Result<(), Error> {
        let mut all: Vec<&Path> = path.ancestors().collect();
        all.reverse();
        for folder in all {
            if self.manifest.entry(folder).is_some() {
                continue;
            }
            let there = target.on_host(folder).is_dir();
            if !there {
                self.actions.push(Action::Folder(folder.to_owned()));
            }
            if !there || old.entry(folder) == Some(&Kind::Folder) {
                self.place(folder, Kind::Folder);
            }
        }
        Ok(())
    }

    fn place(&mut self, path: &Path, kind: Kind) {
        let path = path.to_owned();
        self.manifest.entries.push(Entry { path, kind });
    }

    fn item(&mut self, target: &Target, old: &Manifest, item: Item) -> Result<(), Error> {
        if let Some(folder) = item.path().parent() {
            self.folders(target, old, folder)?;
        }
        let on_host = target.on_host(item.path());
        let known = old.entry(item.path());
        match item {
            Item::Copy { from, path, mode } => {
                let bytes = fs::read(&from).map_err(io_error("reading", &from))?;
                let there = read(&on_host)?;
                let hash = sha256(&bytes);
                if there.is_some() && known.is_none() {
                    return Err(Error::Foreign { path });
                }
                if there.is_none_or(|there| sha256(&there) != hash) {
                    self.write(&path, bytes, mode, None);
                }
                self.place(&path, file(hash, None));
            }
            Item::Link { path, to } => {
                match fs::read_link(&on_host) {
                    Ok(there) if there == to => {}
                    Ok(_) if known.is_some() => self.link(&path, &to),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => self.link(&path, &to),
                    _ => return Err(Error::Foreign { path }),
                }
                self.place(&path, Kind::Link { to });
            }
            Item::Text { path, text } => {
                let there = read(&on_host)?;
                let hash = sha256(text.as_bytes());
                let as_placed = match (&there, known) {
                    (None, _) => true,
                    (Some(there), Some(Kind::File { sha256: placed, .. })) => {
                        sha256(there) == *placed
                    }
                    (Some(_), _) => false,
                };
                if !as_placed {
                    self.left
                        .push(format!("{}: is there and stays", path.display()));
                    if let Some(known) = known {
                        self.place(&path, known.clone());
                    }
                    return Ok(());
                }
                if there.as_ref().is_none_or(|there| sha256(there) != hash) {
                    let before = there.map(|there| String::from_utf8_lossy(&there).into_owned());
                    self.write(&path, text.into_bytes(), 0o644, before);
                }
                self.place(&path, file(hash, None));
            }
            Item::Edit { path, text } => {
                let there =
                    read(&on_host)?.map(|there| String::from_utf8_lossy(&there).into_owned());
                if there.as_deref() == Some(&text) {
                    // As it should be; whose edit that is, the old manifest knows.
                    if let Some(known) = known {
                        self.place(&path, known.clone());
                    }
                    return Ok(());
                }
                let mode =
                    fs::metadata(&on_host).map_or(0o644, |data| data.permissions().mode() & 0o7777);
                let before = there.clone().map(|text| Before { text, mode });
                let hash = sha256(text.as_bytes());
                self.write(&path, text.into_bytes(), mode, there);
                self.place(&path, file(hash, before));
            }
        }
        Ok(())
    }

    fn write(&mut self, path: &Path, bytes: Vec<u8>, mode: u32, before: Option<String>) {
        self.actions.push(Action::File {
            path: path.to_owned(),
            bytes,
            mode,
            before,
        });
    }

    fn link(&mut self, path: &Path, to: &Path) {
        self.actions.push(Action::Link {
            path: path.to_owned(),
            to: to.to_owned(),
        });
    }

    /// What is or would be done, and what the operator has to do then.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for action in &self.actions {
            text.push_str(&match action {
                Action::Folder(path) => format!("folder {}\n", path.display()),
                Action::Link { path, to } => {
                    format!("link   {} -> {}\n", path.display(), to.display())
                }
                Action::Remove(entry) => format!("remove {}\n", entry.path.display()),
                Action::File {
                    path,
                    bytes,
                    before,
                    ..
                } => match std::str::from_utf8(bytes) {
                    Ok(after) if bytes.len() < 16 << 10 => {
                        let before = before.as_deref().unwrap_or_default();
                        format!("file   {}\n{}", path.display(), diff(before, after))
                    }
                    _ => format!("file   {} ({} KiB)\n", path.display(), bytes.len() >> 10),
                },
            });
        }
        if self.actions.is_empty() {
            text.push_str("Everything is in place.\n");
        }
        for left in &self.left {
            text.push_str(&format!("left   {left}\n"));
        }
        if !self.todo.is_empty() {
            text.push_str("\nTo do by hand:\n");
        }
        for todo in &self.todo {
            text.push_str(&format!("- {}\n", todo.trim_end().replace('\n', "\n  ")));
        }
        text
    }

    /// Does it.
    pub fn apply(&self, target: &Target) -> Result<(), Error> {
        let manifest = target.on_host(&target.manifest());
        let json = serde_json::to_vec_pretty(&self.manifest)
            .map_err(|error| io_error("writing", &manifest)(error.into()))?;
        let lib = target.on_host(&target.lib());
        fs::create_dir_all(&lib).map_err(io_error("making", &lib))?;
        // First: what comes now can be taken back, wherever it stops.
        write(&manifest, &json, 0o600)?;
        for action in &self.actions {
            match action {
                Action::Folder(path) => {
                    let path = target.on_host(path);
                    match fs::create_dir(&path) {
                        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                            return Err(io_error("making", &path)(error));
                        }
                        _ => {}
                    }
                }
                Action::File {
                    path, bytes, mode, ..
                } => write(&target.on_host(path), bytes, *mode)?,
                Action::Link { path, to } => {
                    let path = target.on_host(path);
                    let new = beside(&path);
                    let _ = fs::remove_file(&new);
                    symlink(to, &new)
                        .and_then(|()| fs::rename(&new, &path))
                        .map_err(io_error("making", &path))?;
                }
                Action::Remove(entry) => {
                    undo::take_back(target, entry)?;
                }
            }
        }
        Ok(())
    }
}

fn file(sha256: String, before: Option<Before>) -> Kind {
    Kind::File { sha256, before }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(io_error("reading", path)(source)),
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".bulkhead-new");
    path.with_file_name(name)
}

/// Writes a file and puts it in its place whole: a program that runs keeps the old one.
pub(super) fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let new = beside(path);
    let _ = fs::remove_file(&new);
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            // Not by open's mode: the umask would have its say.
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()?;
            fs::rename(&new, path)
        });
    written.map_err(|error| {
        let _ = fs::remove_file(&new);
        io_error("writing", path)(error)
    })
}
