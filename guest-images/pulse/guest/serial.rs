//! COM1, polled. vCPU 0 alone uses it, so lines are never torn.

use core::fmt;

use crate::port;

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// A 16550 that says its transmitter is empty takes as many bytes without being asked
/// again. Every port access is an exit to the VMM, so this halves the cost of a line.
const FIFO_DEPTH: usize = 16;

/// Sets 8n1 and turns the FIFOs on.
pub fn init() {
    port::write(LINE_CONTROL, 0x03);
    port::write(FIFO_CONTROL, 0x07);
}

/// A received byte, if one waits.
pub fn receive() -> Option<u8> {
    (port::read(LINE_STATUS) & DATA_READY != 0).then(|| port::read(DATA))
}

/// Sends bytes, waiting while the device is busy.
pub fn send(bytes: &[u8]) {
    for burst in bytes.chunks(FIFO_DEPTH) {
        while port::read(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            core::hint::spin_loop();
        }
        for &byte in burst {
            port::write(DATA, byte);
        }
    }
}

/// Collects a line and sends it whole; what does not fit is cut off.
pub struct Line {
    bytes: [u8; 512],
    used: usize,
}

impl Line {
    /// An empty line.
    pub const fn new() -> Self {
        Self { bytes: [0; 512], used: 0 }
    }

    /// Sends the line and its line feed.
    pub fn send(mut self) {
        self.bytes[self.used] = b'\n';
        send(&self.bytes[..=self.used]);
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.len() - 1 - self.used;
        let part = &text.as_bytes()[..text.len().min(room)];
        self.bytes[self.used..self.used + part.len()].copy_from_slice(part);
        self.used += part.len();
        Ok(())
    }
}

/// `println!` for COM1.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        let mut line = $crate::serial::Line::new();
        // A line cuts off rather than fails.
        let _ = write!(line, $($argument)*);
        line.send();
    }};
}
