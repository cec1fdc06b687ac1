//! containerd's configuration: the runtime handler `bulkhead` of its CRI plugin. (`ctr` and Docker need none: they name the shim.)
//!
//! A drop-in file is written where the main file imports one and containerd merges it. 1.x replaces the whole section of a plugin by
//! a drop-in's, so there it is written only if the main file has no such section. A main file that is there is never edited: then
//! the lines to add are told.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// containerd's main file.
pub const MAIN: &str = "/etc/containerd/config.toml";
/// Where drop-ins go if the main file names no folder.
const DROP_INS: &str = "/etc/containerd/conf.d";
/// Our drop-in's name.
const NAME: &str = "bulkhead.toml";
/// Name of the runtime handler.
pub const HANDLER: &str = "bulkhead";

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing: the handler is there.
    Done,
    /// Write this file.
    Write {
        /// Which one.
        path: PathBuf,
        /// Its content.
        text: String,
        /// Lines that the operator has to add to the main file, if any.
        add: Option<String>,
    },
    /// Add these lines to the main file.
    Add(String),
}

/// The section with the handler. Versions: 2 for containerd 1.x, 3 for 2.x.
pub fn section(version: i64) -> String {
    let plugin = match version {
        3.. => "'io.containerd.cri.v1.runtime'",
        _ => "\"io.containerd.grpc.v1.cri\"",
    };
    format!(
        "[plugins.{plugin}.containerd.runtimes.{HANDLER}]\n\
         runtime_type = \"io.containerd.bulkhead.v1\"\n\
         # A privileged container is privileged in its guest, and gets no device of this host.\n\
         privileged_without_host_devices = true\n\
         pod_annotations = [\"io.bulkhead.*\"]\n"
    )
}

fn file(version: i64) -> String {
    format!(
        "# Written by `bulkhead install`.\nversion = {version}\n\n{}",
        section(version)
    )
}

/// What to do for a containerd of this version and its main file, if that is there.
pub fn plan(containerd: (u32, u32), main: Option<&str>) -> Result<Plan, String> {
    let newest = if containerd.0 >= 2 { 3 } else { 2 };
    let Some(text) = main.filter(|text| !text.trim().is_empty()) else {
        return Ok(Plan::Write {
            path: MAIN.into(),
            text: file(newest),
            add: None,
        });
    };
    let main: Table = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    let version = main.get("version").and_then(Value::as_integer).unwrap_or(1);
    if has_handler(&main) {
        return Ok(Plan::Done);
    }
    // A file of version 1 names plugins otherwise; 2.x takes a drop-in of its main file's version or below.
    let usable = (2..=newest).contains(&version);
    let merges = containerd.0 >= 2 || section_of(&main).is_none();
    let folder = imported_folder(&main);
    if !usable || !merges || (containerd.0 < 2 && folder.is_none()) {
        return Ok(Plan::Add(section(version.clamp(2, newest))));
    }
    let add = match &folder {
        Some(_) => None,
        None => Some(format!("imports = [\"{DROP_INS}/*.toml\"]\n")),
    };
    Ok(Plan::Write {
        path: folder.unwrap_or_else(|| DROP_INS.into()).join(NAME),
        text: file(version),
        add,
    })
}

fn plugins(main: &Table) -> impl Iterator<Item = &Table> {
    let plugins = main.get("plugins").and_then(Value::as_table);
    let names = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
    names
        .into_iter()
        .filter_map(move |name| plugins?.get(name)?.as_table())
}

fn section_of(main: &Table) -> Option<&Table> {
    plugins(main).next()
}

fn has_handler(main: &Table) -> bool {
    plugins(main).any(|plugin| {
        let runtimes = plugin.get("containerd").and_then(|c| c.get("runtimes"));
        runtimes.and_then(|r| r.get(HANDLER)).is_some()
    })
}

/// The folder whose `*.toml` the main file imports.
fn imported_folder(main: &Table) -> Option<PathBuf> {
    let imports = main.get("imports")?.as_array()?;
    let beside = Path::new(MAIN).parent()?;
    imports.iter().find_map(|import| {
        let folder = import.as_str()?.strip_suffix("/*.toml")?;
        (!folder.contains('*')).then(|| beside.join(folder))
    })
}

/// Whether the main file turns the CRI plugin off, as Docker's packages do.
pub fn cri_is_off(main: &str) -> bool {
    let main: Table = toml::from_str(main).unwrap_or_default();
    let off = main.get("disabled_plugins").and_then(Value::as_array);
    off.is_some_and(|plugins| {
        let names = [
            "cri",
            "io.containerd.grpc.v1.cri",
            "io.containerd.cri.v1.runtime",
        ];
        plugins
            .iter()
            .any(|p| p.as_str().is_some_and(|p| names.contains(&p)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(plan: Plan) -> (PathBuf, Table, Option<String>) {
        match plan {
            Plan::Write { path, text, add } => (path, toml::from_str(&text).unwrap(), add),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_a_main_file_ours_is_it_in_the_version_of_containerd() {
        for (containerd, version) in [((1, 6), 2), ((1, 7), 2), ((2, 0), 3), ((2, 2), 3)] {
            for main in [None, Some(""), Some("\n")] {
                let (path, text, add) = written(plan(containerd, main).unwrap());
                assert_eq!((path.as_path(), add), (Path::new(MAIN), None));
                assert_eq!(text["version"].as_integer(), Some(version));
                assert!(has_handler(&text));
            }
        }
    }

    #[test]
    fn a_drop_in_is_written_where_it_is_imported_and_merged() {
        let main = "version = 2\nimports = [\"/etc/containerd/more.d/*.toml\"]\n";
        let (path, text, add) = written(plan((1, 7), Some(main)).unwrap());
        assert_eq!(path, Path::new("/etc/containerd/more.d/bulkhead.toml"));
        assert_eq!((text["version"].as_integer(), add), (Some(2), None));
        // 1.x would lose the main file's section.
        let cri = format!("{main}[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/x\"\n");
        assert_eq!(plan((1, 7), Some(&cri)).unwrap(), Plan::Add(section(2)));
        // 2.x merges, and wants no newer version than the main file's.
        let (_, text, _) = written(plan((2, 1), Some(&cri)).unwrap());
        assert_eq!(text["version"].as_integer(), Some(2));
        let relative = "version = 3\nimports = [\"conf.d/*.toml\"]\n";
        let (path, text, _) = written(plan((2, 1), Some(relative)).unwrap());
        assert_eq!(path, Path::new("/etc/containerd/conf.d/bulkhead.toml"));
        assert_eq!(text["version"].as_integer(), Some(3));
    }

    #[test]
    fn what_must_be_added_by_hand_is_told() {
        let (_, _, add) = written(plan((2, 0), Some("version = 3\n")).unwrap());
        assert_eq!(
            add.unwrap(),
            "imports = [\"/etc/containerd/conf.d/*.toml\"]\n"
        );
        assert_eq!(
            plan((1, 6), Some("version = 2\n")).unwrap(),
            Plan::Add(section(2))
        );
        assert!(matches!(
            plan((2, 0), Some("root = '/x'\n")),
            Ok(Plan::Add(_))
        ));
        assert_eq!(plan((1, 6), Some(&file(2))).unwrap(), Plan::Done);
        assert!(plan((1, 6), Some("version = ")).is_err());
    }

    #[test]
    fn a_plugin_that_is_off_is_seen() {
        assert!(cri_is_off("disabled_plugins = [\"cri\"]"));
        assert!(!cri_is_off("disabled_plugins = []"));
    }
}
