//! The keyboard controller, as far as a guest without a keyboard needs it: its reset line restarts the machine, that is,
//! ends it.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::machine::end::{End, EndSender};
use crate::serial::ConsoleRing;

/// Offset of the command and status port, 0x64.
const COMMAND: u64 = 4;
/// Pulse the reset line.
const RESET: u8 = 0xfe;

/// The controller, on ports 0x60 to 0x64.
pub struct I8042 {
    console: Arc<ConsoleRing>,
    end: EndSender,
}

impl I8042 {
    /// The console tells why the guest resets.
    pub fn new(console: Arc<ConsoleRing>, end: EndSender) -> Self {
        Self { console, end }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Nothing to read, and ready for a command: a kernel that waits for that before the reset need not wait.
        if offset == COMMAND {
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [RESET] {
            self.end.send(End::guest_reset(&self.console));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::end::{EndReason, end_channel};

    #[test]
    fn only_the_reset_command_ends_the_machine() {
        let (sender, receiver) = end_channel();
        let mut device = I8042::new(ConsoleRing::new(), sender);
        device.write(COMMAND, &[0xd1]);
        device.write(0, &[RESET]);
        device.write(COMMAND, &[RESET, 0]);
        assert!(receiver.try_recv().is_err());
        device.write(COMMAND, &[RESET]);
        assert_eq!(
            receiver.try_recv().unwrap().reason,
            EndReason::GuestShutdown
        );
    }
}
