//! The images of `tests/images`: in containerd, and their trees on the host.

use std::{fs, path::PathBuf};

use super::Suite;
use crate::{
    command::Invocation,
    containerd::unmount_below,
    failure::{Outcome, skip},
};

/// An image of `tests/images`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Image {
    /// A static busybox.
    Busybox,
    /// A Debian base with python3.
    Python,
    /// Busybox under 19 layers that replace and remove.
    Layers,
    /// Busybox and 50,000 small files.
    Files,
    /// Busybox and servers and clients of the network.
    Net,
    /// Busybox and fio.
    Fio,
    /// Busybox, bash and a Node.js application that listens at 8080.
    Node,
    /// Busybox that sleeps: holds a pod of CRI.
    Pause,
}

impl Image {
    /// Name of its tar file, and part of its reference.
    pub fn name(self) -> &'static str {
        match self {
            Self::Busybox => "busybox",
            Self::Python => "python",
            Self::Layers => "layers",
            Self::Files => "files",
            Self::Net => "net",
            Self::Fio => "fio",
            Self::Node => "node",
            Self::Pause => "pause",
        }
    }

    /// Its reference.
    pub fn reference(self) -> String {
        format!("localhost/bulkhead/{}:latest", self.name())
    }
}

impl Suite {
    /// Imports an image unless it is there.
    pub fn import(&self, image: Image) -> Outcome {
        self.import_into(image, &self.namespace)
    }

    /// The same in another namespace of containerd's.
    pub fn import_into(&self, image: Image, namespace: &str) -> Outcome {
        let key = (image, namespace.to_owned());
        if self.imported.borrow().contains(&key) {
            return Ok(());
        }
        let tar = self.tar_of(image)?;
        self.ctr(["-n", namespace, "image", "import"])
            .arg(&tar)
            .limit(self.scale.seconds(120))
            .output()?
            .ok()?;
        self.imported.borrow_mut().insert(key);
        Ok(())
    }

    /// An image's tar file.
    pub fn tar_of(&self, image: Image) -> Outcome<PathBuf> {
        let name = match image {
            // Unpacking 50,000 files takes such a host ten minutes.
            Image::Files if !self.scale.pods_are_cheap() => "few-files",
            other => other.name(),
        };
        let tar = self.images.join(format!("{name}.tar"));
        match tar.exists() {
            true => Ok(tar),
            false => skip(format!("no image {}", tar.display())),
        }
    }

    /// Mounts an image's tree on the host; it goes with the value.
    pub fn mount(&self, image: Image) -> Outcome<Mounted> {
        self.import(image)?;
        let key = self.name("view");
        let folder = self.folder(&key)?;
        let reference = image.reference();
        let mount = self.ctr(["image", "mount", &reference]).arg(&folder);
        mount.output()?.ok()?;
        let unmount = self.command("umount").arg(&folder);
        let remove = self.ctr(["snapshot", "rm"]).arg(&folder);
        // `ctr` keeps it for a day.
        let lease = self.ctr(["leases", "delete"]).arg(&folder);
        Ok(Mounted {
            folder,
            remove: vec![unmount, remove, lease],
        })
    }

    /// Mounts a container's snapshot on the host.
    pub fn mount_snapshot(&self, container: &str) -> Outcome<Mounted> {
        let folder = self.folder(&self.name("snapshot"))?;
        let words = self.ctr(["snapshot", "mounts"]).arg(&folder).arg(container);
        let command = words.output()?.ok()?.text();
        Invocation::new("sh")
            .args(["-ec", &command])
            // The new mount API takes no option of more than 255 bytes, and twenty layers are longer.
            .env("LIBMOUNT_FORCE_MOUNT2", "always")
            .output()?
            .ok()?;
        Ok(Mounted {
            folder,
            remove: Vec::new(),
        })
    }

    /// A busybox tree in a folder on the host.
    pub fn rootfs(&self) -> Outcome<PathBuf> {
        if let Some(folder) = self.rootfs.get() {
            return Ok(folder.clone());
        }
        let mounted = self.mount(Image::Busybox)?;
        let folder = self.data.join("rootfs");
        let copy = self
            .command("cp")
            .arg("-a")
            .arg(&mounted.folder)
            .arg(&folder);
        copy.output()?.ok()?;
        Ok(self.rootfs.get_or_init(|| folder).clone())
    }
}

/// A tree mounted on the host; unmounted at its end.
#[derive(Debug)]
pub struct Mounted {
    /// Where.
    pub folder: PathBuf,
    remove: Vec<Invocation>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for command in self.remove.drain(..) {
            let _ = command.output();
        }
        unmount_below(&self.folder);
        let _ = fs::remove_dir(&self.folder);
    }
}
