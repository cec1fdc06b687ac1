//! A running device: its queues, and who serves them now.
//!
//! The queues belong to [`Running`] from the driver's activation to its reset. Threads borrow them through a lock, and
//! the kernel through [`Vhost`]; [`Running::stop`] takes them back, with nothing in flight, for whoever comes next.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::pair::Pair;
use super::slot::{Link, NetError};
use super::{Tap, TapError};
use crate::limits;
use crate::virtio::ActivateError;
use crate::virtio::queue::{QueueError, VirtQueue, log_broken};
use crate::virtio::worker::Worker;

/// Control messages (section 5.1.6.5): class and command of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, and the answers.
const PAIRS_SET: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

/// The two queues of a pair.
pub struct Rings {
    /// To the guest.
    pub receive: VirtQueue,
    /// From the guest.
    pub transmit: VirtQueue,
}

type SharedRings = Arc<Mutex<Rings>>;

/// Which queues of the tap take frames: as many as the guest has turned on.
struct Queuing {
    pairs: usize,
    enabled: usize,
    taps: Vec<Arc<Tap>>,
}

/// See the module.
pub(super) struct Running {
    features: u64,
    /// By pair; a driver need not take all.
    rings: Vec<Option<SharedRings>>,
    queuing: Arc<Mutex<Queuing>>,
    workers: Vec<Worker>,
    _control: Option<Worker>,
}

impl Running {
    /// Takes the queues; nobody serves those of `pairs` yet.
    pub fn new(
        features: u64,
        pairs: Vec<Option<Rings>>,
        control: Option<VirtQueue>,
    ) -> Result<Self, ActivateError> {
        let queuing = Arc::new(Mutex::new(Queuing {
            pairs: pairs.len(),
            // The guest turns the others on.
            enabled: 1,
            taps: Vec::new(),
        }));
        let control = match control {
            Some(mut queue) => {
                let kick = queue.kick().try_clone();
                let kick = kick.map_err(|source| ActivateError::Io {
                    what: "share an event",
                    source,
                })?;
                let queuing = queuing.clone();
                let serve = move || going(serve_control(&mut queue, &queuing));
                Some(Worker::start("net-control", vec![kick], serve)?)
            }
            None => None,
        };
        let pairs = pairs.into_iter();
        Ok(Self {
            features,
            rings: pairs
                .map(|rings| Some(Arc::new(Mutex::new(rings?))))
                .collect(),
            queuing,
            workers: Vec::new(),
            _control: control,
        })
    }

    /// Serves the queues for `link`, or for an empty slot. On an error some may be served: stop them.
    pub fn start(&mut self, id: &str, link: Option<&mut Link>) -> Result<(), NetError> {
        let Some(link) = link else {
            return self.start_empty(id);
        };
        let mut queuing = lock(&self.queuing);
        queuing.taps.clone_from(&link.taps);
        let wanted = (self.features, queuing.enabled);
        if link.set_up.is_none_or(|(_, done)| done != Some(wanted)) {
            rest(link.set_up.map(|(at, _)| at));
            let now = Instant::now();
            link.set_up = Some((now, None));
            for (index, tap) in link.taps.iter().enumerate() {
                set_up(tap, self.features, index < queuing.enabled)?;
            }
            link.set_up = Some((now, Some(wanted)));
        }
        drop(queuing);
        let pairs = self.rings.iter().enumerate();
        for (index, rings) in pairs.filter_map(|(index, rings)| Some((index, rings.as_ref()?))) {
            let tap = link.taps.get(index);
            if let (Some(vhost), Some(tap)) = (link.vhosts.get_mut(index), tap) {
                vhost.start(&lock(rings), tap, self.features)?;
                continue;
            }
            // A pair beyond the queues of the tap only sends.
            let shared = link
                .taps
                .get(index.checked_rem(link.taps.len()).unwrap_or(0));
            let Some(shared) = shared else { continue };
            let io = |what| move |source| NetError::Io { what, source };
            let receives = tap.is_some();
            let mut pair = Pair::new(
                shared.clone(),
                link.mac,
                self.features,
                link.rates.clone(),
                receives,
            )
            .map_err(io("make a timer"))?;
            let kicks = kicks(&lock(rings)).map_err(io("share an event"))?;
            let sources = pair.sources().map_err(io("share a descriptor"))?;
            let rings = rings.clone();
            let serve = move || going(pair.serve(&mut lock(&rings)));
            let name = format!("{id}-{index}");
            self.workers
                .push(Worker::start_with(&name, kicks, sources, serve)?);
        }
        Ok(())
    }

    /// One thread is enough to give back what nobody looks at.
    fn start_empty(&mut self, id: &str) -> Result<(), NetError> {
        let mut rings: Vec<SharedRings> = self.rings.iter().flatten().cloned().collect();
        let kicks = rings
            .iter()
            .map(|rings| lock(rings).transmit.kick().try_clone());
        let kicks = kicks.collect::<io::Result<_>>();
        let kicks = kicks.map_err(|source| NetError::Io {
            what: "share an event",
            source,
        })?;
        let serve = move || {
            // A pair whose ring is broken holds up no other.
            rings.retain(|rings| going(discard(&mut lock(rings).transmit)));
            !rings.is_empty()
        };
        self.workers.push(Worker::start(id, kicks, serve)?);
        Ok(())
    }

    /// Nobody serves the queues any more, and nobody but `link` holds its descriptors.
    pub fn stop(&mut self, link: Option<&mut Link>) {
        self.workers.clear();
        let mut queuing = lock(&self.queuing);
        queuing.taps.clear();
        let Some(link) = link else { return };
        if let Some((_, Some((_, enabled)))) = &mut link.set_up {
            *enabled = queuing.enabled;
        }
        drop(queuing);
        for (vhost, rings) in link.vhosts.iter_mut().zip(&self.rings) {
            if let Some(rings) = rings {
                vhost.stop(&mut lock(rings));
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kicks(rings: &Rings) -> io::Result<Vec<vmm_sys_util::eventfd::EventFd>> {
    let queues = [&rings.receive, &rings.transmit];
    queues
        .map(|queue| queue.kick().try_clone())
        .into_iter()
        .collect()
}

fn set_up(tap: &Tap, features: u64, on: bool) -> Result<(), TapError> {
    // A queue that is off takes no settings.
    tap.enable(true)?;
    tap.set_offload(features)?;
    tap.enable(on)
}

/// A change of a tap's queues takes a lock that the whole host's network shares: a guest must not hold it all the time.
fn rest(since: Option<Instant>) {
    let passed = since.map_or(limits::NET_PAIRS_REST, |since| since.elapsed());
    std::thread::sleep(limits::NET_PAIRS_REST.saturating_sub(passed));
}

fn going(served: Result<(), QueueError>) -> bool {
    if let Err(error) = &served {
        log_broken("net", error);
    }
    served.is_ok()
}

/// Frames of a guest whose slot is empty.
fn discard(queue: &mut VirtQueue) -> Result<(), QueueError> {
    for _ in 0..limits::NET_FRAMES_AT_ONCE {
        let Some(chain) = queue.pop()? else {
            if queue.enable_kicks()? {
                continue;
            }
            return queue.notify();
        };
        queue.push(chain, 0)?;
    }
    queue.serve_again();
    queue.notify()
}

/// A handful of messages in a guest's life.
fn serve_control(queue: &mut VirtQueue, queuing: &Mutex<Queuing>) -> Result<(), QueueError> {
    for _ in 0..limits::REQUESTS_AT_ONCE {
        let Some(chain) = queue.pop()? else {
            if queue.enable_kicks()? {
                continue;
            }
            return queue.notify();
        };
        let mut message = [0; 4];
        let got = chain.reader().read_exact(&mut message);
        let before = lock(queuing).enabled;
        let answer = match (got, message) {
            (Ok(()), [class, command, low, high]) if [class, command] == PAIRS_SET => {
                enable_pairs(&mut lock(queuing), u16::from_le_bytes([low, high]))
            }
            _ => ERR,
        };
        let written = chain.writer().write_all(&[answer]);
        queue.push(chain, u32::from(written.is_ok()))?;
        if lock(queuing).enabled != before {
            rest(Some(Instant::now()));
            break;
        }
    }
    queue.serve_again();
    queue.notify()
}

fn enable_pairs(queuing: &mut Queuing, wanted: u16) -> u8 {
    let wanted = usize::from(wanted);
    if !(1..=queuing.pairs).contains(&wanted) {
        return ERR;
    }
    if queuing.enabled == wanted {
        return OK;
    }
    for (index, tap) in queuing.taps.iter().enumerate() {
        if let Err(error) = tap.enable(index < wanted) {
            tracing::warn!(%error, "cannot change the number of the tap's queues");
            return ERR;
        }
    }
    queuing.enabled = wanted;
    OK
}
