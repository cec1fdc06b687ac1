//! A slot: what the device, which the driver starts and stops, and the control socket, which fills and empties it, share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::bucket::Rates;
use super::link::Running;
use super::vhost::{Vhost, VhostError};
use super::{Mac, Rate, Tap, TapError};
use crate::virtio::SharedMemory;

/// Why a slot is not as asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A descriptor that is no tap for us.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel's data path.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// It has a tap already.
    #[error("network slot {0} is taken")]
    Taken(String),
    /// It has none.
    #[error("network slot {0} is empty")]
    Empty(String),
    /// Too few or too many queues of a tap.
    #[error("network slot {id} takes 1 to {pairs} tap descriptors, not {taps}")]
    Taps {
        /// Name of the slot.
        id: String,
        /// What it has.
        pairs: usize,
        /// What was given.
        taps: usize,
    },
    /// Every queue of the tap or none goes by the kernel.
    #[error(
        "network slot {id} takes no vhost descriptor or one for each of {taps} of the tap, not {vhosts}"
    )]
    Vhosts {
        /// Name of the slot.
        id: String,
        /// Queues of the tap.
        taps: usize,
        /// What was given.
        vhosts: usize,
    },
    /// The kernel's data path knows no rates.
    #[error("network slot {0} cannot have a rate with vhost")]
    RateWithVhost(String),
    /// The emulator carries kicks and calls itself.
    #[error("network slot {0} cannot use vhost: engine emulated")]
    NoVhost(String),
    /// A thread, timer or descriptor could not be made.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A thread of the device could not be started.
    #[error(transparent)]
    Worker(#[from] crate::virtio::ActivateError),
}

/// What is put into a slot.
#[derive(Debug)]
pub struct Attachment {
    /// The only source address that the guest may send from.
    pub mac: Mac,
    /// Caps of our own path.
    pub rate: Rate,
    /// The queues of one tap, made with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`: at most one for each pair.
    pub taps: Vec<OwnedFd>,
    /// None, or for each queue of the tap an open `/dev/vhost-net`.
    pub vhosts: Vec<OwnedFd>,
}

/// An [`Attachment`] that was checked.
pub(super) struct Link {
    pub mac: Mac,
    pub rates: Option<Arc<Rates>>,
    pub taps: Vec<Arc<Tap>>,
    pub vhosts: Vec<Vhost>,
    /// When the taps' queues were set up last, and for which features and number of pairs if it succeeded.
    pub set_up: Option<(Instant, Option<(u64, usize)>)>,
}

/// See the module.
pub struct Slot {
    id: String,
    mac: Mac,
    pairs: usize,
    vhost: bool,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub link: Option<Link>,
    /// While the driver has the device running.
    pub running: Option<Running>,
}

impl Slot {
    /// An empty slot whose device tells the guest `mac` and has `pairs` of queues, 1 or more. `vhost`: the machine's
    /// engine can leave the queues to the kernel.
    pub fn new(id: &str, mac: Mac, pairs: usize, vhost: bool) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            mac,
            pairs: pairs.max(1),
            vhost,
            state: Mutex::default(),
        })
    }

    /// The slot's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The address that the guest finds in the device.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Pairs of queues of the device.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Fills the slot. On an error it is as empty as before and all descriptors are closed.
    pub fn attach(&self, attachment: Attachment) -> Result<(), NetError> {
        let mut state = self.state();
        let State { link, running } = &mut *state;
        if link.is_some() {
            return Err(NetError::Taken(self.id.clone()));
        }
        let mut checked = self.check(attachment)?;
        if let Some(running) = running {
            running.stop(None);
            if let Err(error) = running.start(&self.id, Some(&mut checked)) {
                running.stop(Some(&mut checked));
                running.start(&self.id, None)?;
                return Err(error);
            }
        }
        let (queues, vhost) = (checked.taps.len(), !checked.vhosts.is_empty());
        tracing::info!(slot = self.id, queues, vhost, "network slot filled");
        *link = Some(checked);
        Ok(())
    }

    /// Empties the slot. When it returns, nobody holds its descriptors any more.
    pub fn detach(&self) -> Result<(), NetError> {
        let mut state = self.state();
        let State { link, running } = &mut *state;
        let mut old = link
            .take()
            .ok_or_else(|| NetError::Empty(self.id.clone()))?;
        if let Some(running) = running {
            running.stop(Some(&mut old));
            running.start(&self.id, None)?;
        }
        tracing::info!(slot = self.id, "network slot emptied");
        Ok(())
    }

    /// The machine has more memory: whoever serves the queues for us is told. One that is started later reads the map
    /// itself; the slot's lock orders the two.
    pub fn memory_grew(&self, memory: &SharedMemory) -> Result<(), NetError> {
        let mut state = self.state();
        if state.running.is_none() {
            return Ok(());
        }
        let vhosts = state.link.iter_mut().flat_map(|link| &mut link.vhosts);
        for vhost in vhosts {
            vhost.set_memory(memory.clone())?;
        }
        Ok(())
    }

    fn check(&self, attachment: Attachment) -> Result<Link, NetError> {
        let Attachment {
            mac,
            rate,
            taps,
            vhosts,
        } = attachment;
        let id = || self.id.clone();
        if !(1..=self.pairs).contains(&taps.len()) {
            return Err(NetError::Taps {
                id: id(),
                pairs: self.pairs,
                taps: taps.len(),
            });
        }
        let limited = rate != Rate::default();
        match vhosts.len() {
            0 => {}
            _ if !self.vhost => return Err(NetError::NoVhost(id())),
            _ if limited => return Err(NetError::RateWithVhost(id())),
            count if count == taps.len() => {}
            vhosts => {
                return Err(NetError::Vhosts {
                    id: id(),
                    taps: taps.len(),
                    vhosts,
                });
            }
        }
        let taps = taps.into_iter().map(|fd| Ok(Arc::new(Tap::new(fd)?)));
        let vhosts = vhosts.into_iter().map(Vhost::new);
        Ok(Link {
            mac,
            rates: limited.then(|| Arc::new(Rates::new(rate, Instant::now()))),
            taps: taps.collect::<Result<_, TapError>>()?,
            vhosts: vhosts.collect::<Result<_, _>>()?,
            set_up: None,
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
