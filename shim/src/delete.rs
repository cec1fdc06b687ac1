//! `delete`: containerd calls it when a shim is gone, also after an orderly end (runtime v2, "delete").
//!
//! Kills what is left of the pod, removes folder and socket, runs the poststop hooks that a dead shim has left. It can be repeated, and it leaves a pod alone whose
//! shim lives and has another bundle: that is the next pod with the same name.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::MessageField;

use crate::{
    args::Args,
    bootstrap::{remove_socket, socket_path},
    hooks::Runner,
    sandbox::{
        state::{self, IdError, Owner, ProcessId},
        wipe,
    },
    spec,
    task::now,
};

/// How long a shim that was told to end may still take.
const SHIM_END: Duration = Duration::from_millis(700);
/// 128 + SIGKILL.
const KILLED: u32 = 137;

/// Why `delete` could not clean up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An id that cannot be one.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The folder stays.
    #[error("removing {path}: {source}")]
    Remove {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The command `delete`; `state` is the folder of the pods' state folders.
pub fn delete(args: &Args, state: &Path) -> Result<DeleteResponse, Error> {
    let bundle = match args.bundle.as_str() {
        "" => PathBuf::from("."),
        path => path.into(),
    };
    // A bundle that is gone tells nothing: then the id is the pod's.
    let sandbox = spec::sandbox_of(&bundle, &args.id).unwrap_or_default();
    let pod = sandbox.as_deref().unwrap_or(&args.id);
    let dir = state::pod_dir(state, &args.namespace, pod)?;
    let owner = Owner::load(&dir);
    if sandbox.is_some() && owner.is_some_and(|o| o.shim.is_alive()) {
        return Ok(response(None)); // One container of a pod that lives: its shim is in charge.
    }
    let vmm = ProcessId::load(&dir.join("vmm.pid"));
    if is_ours(owner, &bundle, sandbox.is_some()) {
        let socket = socket_path(&args.address, &args.namespace, pod);
        clean(&dir, owner, &socket)?;
    }
    Runner::recover(&bundle);
    Ok(response(vmm))
}

/// Whether the folder belongs to the bundle that is deleted.
fn is_ours(owner: Option<Owner>, bundle: &Path, member: bool) -> bool {
    let Some(owner) = owner else { return true };
    if member || !owner.shim.is_alive() {
        return true;
    }
    state::bundle_inode(bundle) == Some(owner.bundle)
}

fn clean(dir: &Path, owner: Option<Owner>, socket: &Path) -> Result<(), Error> {
    if let Some(owner) = owner
        // With its worker, which ends by itself when the keeper is gone.
        && !owner.shim.wait_gone(SHIM_END)
    {
        owner.shim.kill_session();
        owner.shim.wait_gone(SHIM_END);
    }
    wipe(dir).map_err(|source| Error::Remove {
        path: dir.to_owned(),
        source,
    })?;
    remove_socket(socket).map_err(|source| Error::Remove {
        path: socket.to_owned(),
        source,
    })
}

fn response(vmm: Option<ProcessId>) -> DeleteResponse {
    let mut response = DeleteResponse::new();
    response.pid = vmm.map_or(0, |id| id.pid.unsigned_abs());
    response.exit_status = KILLED;
    response.exited_at = MessageField::some(now());
    response
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    fn setup() -> (tempfile::TempDir, PathBuf, Args, PathBuf) {
        let dir = tempfile::Builder::new().prefix("b").tempdir().unwrap();
        let state = dir.path().join("state");
        let bundle = dir.path().join("bundle");
        fs::create_dir(&bundle).unwrap();
        let args = Args {
            namespace: "default".into(),
            id: "web".into(),
            bundle: bundle.display().to_string(),
            ..Args::default()
        };
        let pod = state.join("default-web");
        fs::create_dir_all(&pod).unwrap();
        (dir, state, args, pod)
    }

    #[test]
    fn a_dead_shims_processes_and_folder_go_and_a_second_delete_is_no_error() {
        let (_dir, state, args, pod) = setup();
        let mut vmm = Command::new("setsid")
            .args(["sleep", "60"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let id = ProcessId::of(vmm.id() as i32).unwrap();
        id.save(&pod.join("vmm.pid")).unwrap();
        let dead = ProcessId {
            pid: id.pid,
            start_time: 1,
        };
        Owner {
            shim: dead,
            bundle: 0,
        }
        .save(&pod)
        .unwrap();
        let answer = delete(&args, &state).unwrap();
        assert_eq!(
            (answer.exit_status, answer.pid),
            (137, id.pid.unsigned_abs())
        );
        assert!(!pod.exists());
        assert!(!vmm.wait().unwrap().success());
        assert_eq!(delete(&args, &state).unwrap().exit_status, 137);
    }

    #[test]
    fn the_next_pod_of_the_same_name_is_left_alone() {
        let (_dir, state, args, pod) = setup();
        let mut shim = Command::new("sleep").arg("60").spawn().unwrap();
        let owner = Owner {
            shim: ProcessId::of(shim.id() as i32).unwrap(),
            bundle: 1,
        };
        owner.save(&pod).unwrap();
        delete(&args, &state).unwrap();
        assert!(pod.exists());
        assert!(shim.try_wait().unwrap().is_none());
        shim.kill().unwrap();
        shim.wait().unwrap();
    }

    #[test]
    fn an_id_with_a_slash_is_refused() {
        let (_dir, state, mut args, _) = setup();
        args.id = "../x".into();
        assert!(matches!(delete(&args, &state), Err(Error::Id(_))));
    }
}
