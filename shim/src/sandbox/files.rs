//! The pod's file server: which trees of the host it serves.

use std::os::fd::OwnedFd;

use super::{Error, Pod, control};
use crate::mounts::Tree;

impl Pod {
    /// Hands trees to the file server; if one is refused, those before it are taken back.
    pub async fn add_trees(&self, trees: &[Tree]) -> Result<(), Error> {
        for (done, tree) in trees.iter().enumerate() {
            if !tree.fresh {
                continue;
            }
            let added = match tree.open() {
                Ok(fd) => self.add_tree(tree, fd).await,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = added {
                let done = trees.get(..done).unwrap_or_default();
                let done: Vec<Tree> = done.iter().filter(|t| t.fresh).cloned().collect();
                self.remove_trees(&done).await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn add_tree(&self, tree: &Tree, fd: OwnedFd) -> Result<(), Error> {
        let request = control::add_tree(&tree.id, tree.readonly, tree.shared);
        self.files.request(request, vec![fd]).await?;
        Ok(())
    }

    /// Takes trees back.
    pub async fn remove_trees(&self, trees: &[Tree]) {
        for tree in trees {
            if self.end().is_some() {
                return;
            }
            let request = control::remove_tree(&tree.id);
            if let Err(error) = self.files.request(request, Vec::new()).await {
                tracing::warn!(tree = tree.id, %error, "a tree stays until the pod ends");
            }
        }
    }
}
