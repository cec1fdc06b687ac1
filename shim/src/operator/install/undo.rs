//! Taking back what a manifest says.

use std::{fs, io, path::Path};

use super::{
    Error, Target, io_error,
    manifest::{Entry, Kind, Manifest, sha256},
    plan::write,
};

/// What became of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Removed.
    Removed,
    /// As it was before.
    Restored,
    /// Was gone already.
    Gone,
    /// Somebody changed it, or put something into it: it stays.
    Left(&'static str),
}

/// Takes everything back, newest first; a line about each path. With `dry_run` nothing is changed.
pub fn undo(target: &Target, dry_run: bool) -> Result<String, Error> {
    let manifest = Manifest::load(target)?.ok_or_else(|| Error::NotInstalled {
        prefix: target.prefix.clone(),
        manifest: target.on_host(&target.manifest()),
    })?;
    let mut text = String::new();
    let mut folders = Vec::new();
    for entry in manifest.entries.iter().rev() {
        if entry.kind == Kind::Folder {
            folders.push(entry);
            continue;
        }
        let taken = if dry_run {
            look(target, entry)?
        } else {
            take_back(target, entry)?
        };
        text.push_str(&line(&taken, &entry.path));
    }
    if dry_run {
        return Ok(text);
    }
    let path = target.on_host(&target.manifest());
    fs::remove_file(&path).map_err(io_error("removing", &path))?;
    // The deepest first.
    folders.sort_by_key(|entry| std::cmp::Reverse(entry.path.components().count()));
    for entry in folders {
        match take_back(target, entry)? {
            Taken::Removed | Taken::Gone => {}
            taken => text.push_str(&line(&taken, &entry.path)),
        }
    }
    Ok(text)
}

fn line(taken: &Taken, path: &Path) -> String {
    let path = path.display();
    match taken {
        Taken::Removed => format!("removed  {path}\n"),
        Taken::Restored => format!("restored {path}\n"),
        Taken::Gone => format!("gone     {path}\n"),
        Taken::Left(why) => format!("left     {path}: {why}\n"),
    }
}

/// What would become of an entry.
fn look(target: &Target, entry: &Entry) -> Result<Taken, Error> {
    let path = target.on_host(&entry.path);
    let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    Ok(match &entry.kind {
        Kind::Folder => match fs::read_dir(&path) {
            Ok(mut inside) => match inside.next() {
                None => Taken::Removed,
                Some(_) => Taken::Left("it is not empty"),
            },
            Err(error) if missing(&error) => Taken::Gone,
            Err(source) => return Err(io_error("reading", &path)(source)),
        },
        Kind::Link { to } => match fs::read_link(&path) {
            Ok(there) if there == *to => Taken::Removed,
            Err(error) if missing(&error) => Taken::Gone,
            _ => Taken::Left("it is not the link that was placed"),
        },
        Kind::File {
            sha256: placed,
            before,
        } => match fs::read(&path) {
            Ok(bytes) if sha256(&bytes) == *placed => match before {
                Some(_) => Taken::Restored,
                None => Taken::Removed,
            },
            // Stopped half-way: not edited yet.
            Ok(bytes) if before.as_ref().is_some_and(|b| b.text.as_bytes() == bytes) => Taken::Gone,
            Ok(_) => Taken::Left("it was changed since"),
            Err(error) if missing(&error) => Taken::Gone,
            Err(source) => return Err(io_error("reading", &path)(source)),
        },
    })
}

/// Takes an entry back, if it is as it was placed.
pub(super) fn take_back(target: &Target, entry: &Entry) -> Result<Taken, Error> {
    let taken = look(target, entry)?;
    let path = target.on_host(&entry.path);
    match (&taken, &entry.kind) {
        (Taken::Removed, Kind::Folder) => {
            fs::remove_dir(&path).map_err(io_error("removing", &path))?;
        }
        (Taken::Removed, _) => fs::remove_file(&path).map_err(io_error("removing", &path))?,
        (
            Taken::Restored,
            Kind::File {
                before: Some(before),
                ..
            },
        ) => {
            write(&path, before.text.as_bytes(), before.mode)?;
        }
        _ => {}
    }
    Ok(taken)
}
