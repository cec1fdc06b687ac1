//! The pod's network: one namespace of the guest that the containers of the pod share, with the interfaces that the host wants it to
//! have. It is made when it is first needed; the machine's network devices wait outside, so a pod sees none but its own.
//!
//! A pod whose first container has a new user namespace gets a network that belongs to it, so that its root has the rights over it that it
//! has with other runtimes.

mod apply;
pub mod forward;
mod namespace;
mod netlink;
pub mod ports;
mod resolver;
mod wanted;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_protocol::agent::SetNetworkRequest;

use crate::error::{Context, Error, Result};
use apply::Network;
use namespace::Namespace;
use resolver::{Detour, Resolver, Sockets};
use wanted::Wanted;

/// The pod's network.
#[derive(Default)]
pub struct PodNetwork(Mutex<State>);

#[derive(Default)]
struct State {
    network: Option<Network>,
    wanted: Wanted,
    /// A container is in it, or was.
    used: bool,
    resolver: Option<Resolver>,
    detour: Detour,
}

impl State {
    fn network(&mut self) -> Result<&mut Network> {
        match &mut self.network {
            Some(network) => Ok(network),
            missing => {
                let made = Namespace::new().and_then(Network::new);
                Ok(missing.insert(made.step(|| "make the pod's network".into())?))
            }
        }
    }

    /// Lets 127.0.0.11 answer, or not.
    fn resolve(&mut self, wanted: bool) -> Result<()> {
        if !wanted {
            self.resolver = None;
        } else if self.resolver.is_none() {
            let what = || format!("resolver: listen on {}", resolver::ADDRESS);
            let sockets = self.network()?.namespace().within(Sockets::bind);
            let started = sockets.and_then(|sockets| Resolver::start(sockets, &mut self.detour));
            self.resolver = Some(started.step(what)?);
        }
        Ok(())
    }
}

impl PodNetwork {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives it the wanted state.
    pub fn set(&self, request: &SetNetworkRequest) -> Result<()> {
        let wanted = Wanted::parse(request)?;
        let mut state = self.state();
        state.network()?.apply(&wanted)?;
        state.resolve(wanted.resolver)?;
        state.wanted = wanted;
        Ok(())
    }

    /// For a container that joins it.
    pub fn join(&self) -> Result<OwnedFd> {
        let mut state = self.state();
        let namespace = state.network()?.namespace().try_clone();
        let namespace = namespace.step(|| "hold the pod's network".into())?;
        state.used = true;
        Ok(namespace)
    }

    /// Whether no container was in it yet.
    pub fn is_unused(&self) -> bool {
        !self.state().used
    }

    /// Makes the network namespace of a container, the first, the pod's.
    pub fn adopt(&self, pid: u32) -> Result<()> {
        let mut state = self.state();
        if state.used {
            let text = "the pod's network is another container's".to_string();
            return Err(Error::State(text));
        }
        if let Some(old) = &mut state.network {
            old.apply(&Wanted::default())?;
        }
        let namespace = Namespace::of_process(pid);
        let mut network = namespace
            .and_then(Network::new)
            .step(|| "enter the container's network".into())?;
        network.apply(&state.wanted)?;
        state.network = Some(network);
        state.used = true;
        // The old one's listens in the old network.
        state.resolver = None;
        let wanted = state.wanted.resolver;
        state.resolve(wanted)
    }

    /// Opens something inside it.
    fn within<T>(&self, act: impl FnOnce() -> io::Result<T>) -> Result<T> {
        let mut state = self.state();
        let namespace = state.network()?.namespace();
        namespace
            .within(act)
            .step(|| "work in the pod's network".into())
    }
}
