//! The serial console: a 16550 on port 0x3f8 whose output is kept in a bounded ring.
//!
//! Both engines push what the guest prints into a [`ConsoleRing`]; the machine reads its tail for `exit.json` and
//! reports. The text is the guest's and proves nothing; it is quoted, never interpreted but for the reason of an end.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::limits;

const PANIC_MARK: &str = "Kernel panic - not syncing";
const RESTART_MARK: &str = "reboot: Restarting system";

/// What the guest printed last, and the lines that tell why it ended.
#[derive(Default)]
pub struct ConsoleRing(Mutex<Ring>);

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes ever pushed.
    total: u64,
    line: Vec<u8>,
    panic: Option<String>,
    restart: bool,
}

/// A piece of the console's output.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// Output as text.
    pub text: String,
    /// Number of the byte after it: where the next piece begins.
    pub next: u64,
}

impl ConsoleRing {
    /// An empty ring.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Appends output of the guest; the oldest bytes make room.
    pub fn push(&self, bytes: &[u8]) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if ring.bytes.len() == limits::CONSOLE_BYTES {
                ring.bytes.pop_front();
            }
            ring.bytes.push_back(byte);
            ring.total = ring.total.wrapping_add(1);
            if byte == b'\n' {
                ring.end_line();
            } else if ring.line.len() < limits::CONSOLE_LINE_BYTES {
                ring.line.push(byte);
            }
        }
    }

    /// The last `max` bytes as text.
    pub fn tail(&self, max: usize) -> String {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = ring.bytes.len().saturating_sub(max);
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Output from byte number `from` on, or from the oldest that is kept; `max` bytes at most.
    pub fn piece(&self, from: u64, max: usize) -> Piece {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = ring.total.saturating_sub(ring.bytes.len() as u64);
        let start = from.clamp(oldest, ring.total);
        let skip = usize::try_from(start.saturating_sub(oldest)).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).take(max).copied().collect();
        Piece {
            text: String::from_utf8_lossy(&bytes).into_owned(),
            next: start.saturating_add(bytes.len() as u64),
        }
    }

    /// The kernel's first panic line, without its time stamp.
    pub fn panic_line(&self) -> Option<String> {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.panic.is_none() {
            // The machine may end before the newline is out.
            ring.end_line();
        }
        ring.panic.clone()
    }

    /// The kernel said that it restarts on purpose.
    pub fn restart_announced(&self) -> bool {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.end_line();
        ring.restart
    }
}

impl Ring {
    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        if self.panic.is_none()
            && let Some(at) = line.find(PANIC_MARK)
        {
            self.panic = line.get(at..).map(|text| text.trim_end().to_owned());
        }
        self.restart |= line.contains(RESTART_MARK);
        self.line.clear();
    }
}

struct RingWriter(Arc<ConsoleRing>);

impl io::Write for RingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct IrqTrigger(EventFd);

impl Trigger for IrqTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // Fails only when the counter is full: then an interrupt is pending already.
        let _ = self.0.write(1);
        Ok(())
    }
}

/// The 16550 on the port bus.
pub struct SerialPort(Serial<IrqTrigger, NoEvents, RingWriter>);

impl SerialPort {
    /// `irq` reaches interrupt line 4.
    pub fn new(irq: EventFd, console: Arc<ConsoleRing>) -> Self {
        Self(Serial::new(IrqTrigger(irq), RingWriter(console)))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // The string form `rep outsb` arrives as one write of many bytes.
        if let Ok(offset) = u8::try_from(offset) {
            for &byte in data {
                // Writing into the ring cannot fail, nor can the trigger.
                let _ = self.0.write(offset, byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_and_keeps_the_newest() {
        let ring = ConsoleRing::default();
        for _ in 0..3 {
            ring.push(&[b'a'; limits::CONSOLE_BYTES]);
        }
        ring.push(b"end");
        assert_eq!(ring.tail(usize::MAX).len(), limits::CONSOLE_BYTES);
        assert_eq!(ring.tail(4), "aend");
    }

    #[test]
    fn pieces_follow_each_other_and_what_is_lost_is_passed_over() {
        let ring = ConsoleRing::default();
        ring.push(b"abcdef");
        let piece = |from, max| {
            let piece = ring.piece(from, max);
            (piece.text, piece.next)
        };
        assert_eq!(piece(0, 4), ("abcd".into(), 4));
        assert_eq!(piece(4, 4), ("ef".into(), 6));
        assert_eq!(piece(6, 4), (String::new(), 6));
        assert_eq!(piece(u64::MAX, 4), (String::new(), 6));
        ring.push(&[b'x'; limits::CONSOLE_BYTES]);
        assert_eq!(piece(0, 1), ("x".into(), 7));
    }

    #[test]
    fn the_first_panic_line_survives_a_flood() {
        let ring = ConsoleRing::default();
        ring.push(b"[    0.5] Kernel panic - not syncing: Attempted to kill init!\r\n");
        ring.push(&vec![b'x'; 2 * limits::CONSOLE_BYTES]);
        assert_eq!(
            ring.panic_line().as_deref(),
            Some("Kernel panic - not syncing: Attempted to kill init!")
        );
        assert!(!ring.restart_announced());
    }

    #[test]
    fn a_line_without_its_newline_counts_at_the_end() {
        let ring = ConsoleRing::default();
        ring.push(b"[    1.0] reboot: Restarting system");
        assert!(ring.restart_announced());
        assert_eq!(ring.panic_line(), None);
    }

    #[test]
    fn output_through_the_port_lands_in_the_ring() {
        let ring = ConsoleRing::new();
        let mut port = SerialPort::new(EventFd::new(0).unwrap(), ring.clone());
        port.write(0, b"hi");
        port.write(300, b"x");
        let mut data = [0xff; 2];
        port.read(5, &mut data);
        assert_eq!(data, [0xff; 2], "a wide read is unclaimed");
        assert_eq!(ring.tail(10), "hi");
    }
}
