//! The device's thread: waits for kicks and sockets, moves packets between the queues and the multiplexer.

use std::io::{self, Read};
use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::muxer::{FIRST_TOKEN, Muxer};
use super::packet::HEADER_LEN;
use super::payload::{RxRoom, TxData};
use crate::virtio::queue::{QueueError, VirtQueue, log_broken};

const STOP: u64 = 0;
const RX_KICK: u64 = 1;
const TX_KICK: u64 = 2;
/// Packets of one direction before the other gets its turn.
const BATCH: usize = 64;
const EVENTS: usize = 64;

/// Everything that the thread owns.
pub struct Worker {
    muxer: Box<Muxer>,
    rx: VirtQueue,
    tx: VirtQueue,
    /// Kept, so that the driver's buffers are not taken for free.
    _event: Option<VirtQueue>,
    stop: EventFd,
}

impl Worker {
    /// Watches the kicks and `stop` beside the sockets.
    pub fn new(
        muxer: Box<Muxer>,
        rx: VirtQueue,
        tx: VirtQueue,
        event: Option<VirtQueue>,
        stop: EventFd,
    ) -> io::Result<Self> {
        let worker = Self {
            muxer,
            rx,
            tx,
            _event: event,
            stop,
        };
        for (fd, token) in worker.own_events() {
            let event = EpollEvent::new(EventSet::IN, token);
            worker.muxer.epoll().ctl(ControlOperation::Add, fd, event)?;
        }
        Ok(worker)
    }

    fn own_events(&self) -> [(i32, u64); 3] {
        [
            (self.stop.as_raw_fd(), STOP),
            (self.rx.kick().as_raw_fd(), RX_KICK),
            (self.tx.kick().as_raw_fd(), TX_KICK),
        ]
    }

    /// Serves until `stop` is signalled; gives the multiplexer back without connections.
    pub fn run(mut self) -> Box<Muxer> {
        if let Err(error) = self.serve() {
            log_broken("vsock", &error);
            self.muxer.reset();
            // Blocks until it is signalled.
            drop(self.stop.read());
        }
        for (fd, _) in self.own_events() {
            let gone = EpollEvent::default();
            if let Err(error) = self.muxer.epoll().ctl(ControlOperation::Delete, fd, gone) {
                tracing::debug!(%error, "cannot stop watching a vsock event");
            }
        }
        self.muxer.reset();
        self.muxer
    }

    fn serve(&mut self) -> Result<(), QueueError> {
        let mut events = vec![EpollEvent::default(); EVENTS];
        let mut more = self.process()?;
        loop {
            let timeout = match self.muxer.timeout() {
                _ if more => 0,
                Some(timeout) => i32::try_from(timeout.as_millis())
                    .unwrap_or(i32::MAX)
                    .max(1),
                None => -1,
            };
            let count = self
                .muxer
                .epoll()
                .wait(timeout, &mut events)
                .unwrap_or_default();
            for event in events.iter().take(count) {
                match event.data() {
                    STOP => return Ok(()),
                    // Failing means that it was read already.
                    RX_KICK => drop(self.rx.kick().read()),
                    TX_KICK => drop(self.tx.kick().read()),
                    token if token >= FIRST_TOKEN => {
                        self.muxer.host_event(token, event.event_set());
                    }
                    _ => {}
                }
            }
            self.muxer.expire();
            more = self.process()?;
        }
    }

    /// Moves what can be moved; `true` if a turn was over before that.
    fn process(&mut self) -> Result<bool, QueueError> {
        let tx_more = self.process_tx()?;
        let rx_more = self.process_rx()?;
        Ok(tx_more || rx_more)
    }

    fn process_tx(&mut self) -> Result<bool, QueueError> {
        let mut done = 0;
        loop {
            let Some(chain) = self.tx.pop()? else {
                if done > 0 {
                    self.tx.notify()?;
                }
                if self.tx.enable_kicks()? {
                    continue;
                }
                return Ok(false);
            };
            let mut header = [0; HEADER_LEN];
            if chain.reader().read_exact(&mut header).is_ok() {
                self.muxer
                    .take_packet(&header, |len| TxData::new(&chain, len));
            }
            self.tx.push(chain, 0)?;
            done += 1;
            if done == BATCH {
                self.tx.notify()?;
                return Ok(true);
            }
        }
    }

    fn process_rx(&mut self) -> Result<bool, QueueError> {
        let mut done = 0;
        while self.muxer.has_packets() {
            let Some(chain) = self.rx.pop()? else {
                if self.rx.enable_kicks()? {
                    continue;
                }
                break;
            };
            let mut written = 0;
            // A chain without room for a header is given back as it is.
            if let Some(mut room) = RxRoom::new(&chain) {
                let Some(packet) = self.muxer.next_packet(&mut room) else {
                    self.rx.unpop(chain);
                    break;
                };
                if room.write_header(&packet.header).is_ok() {
                    written = HEADER_LEN as u32 + packet.len;
                }
            }
            self.rx.push(chain, written)?;
            done += 1;
            if done == BATCH {
                self.rx.notify()?;
                return Ok(self.muxer.has_packets());
            }
        }
        if done > 0 {
            self.rx.notify()?;
        }
        Ok(false)
    }
}
