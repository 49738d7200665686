//! What somebody types at COM1: echo, and the few commands.

use core::sync::atomic::Ordering;

use crate::{port, say, serial, state};

/// The line being typed.
pub struct Console {
    line: [u8; 128],
    used: usize,
}

impl Console {
    /// Nothing typed yet.
    pub const fn new() -> Self {
        Self { line: [0; 128], used: 0 }
    }

    /// Handles all input that waits.
    pub fn poll(&mut self) {
        while let Some(byte) = serial::receive() {
            match byte {
                b'\r' | b'\n' => {
                    serial::send(b"\n");
                    self.complete();
                }
                _ => {
                    serial::send(&[byte]);
                    if let Some(slot) = self.line.get_mut(self.used) {
                        *slot = byte;
                        self.used += 1;
                    }
                }
            }
        }
    }

    /// Ends a half-typed line so that the next one printed starts at a line's beginning.
    /// What was typed is kept: the rest of it may still come.
    pub fn start_of_line(&self, echoed_at: &mut usize) {
        if self.used != *echoed_at && self.used != 0 {
            serial::send(b"\n");
        }
        *echoed_at = self.used;
    }

    fn complete(&mut self) {
        let line = &self.line[..self.used];
        self.used = 0;
        if line.is_empty() {
            return;
        }
        say!("echo: {}", line.escape_ascii());
        match line {
            b"shutdown" => {
                say!("pulse bye");
                port::power_off();
            }
            b"reset" => {
                say!("pulse again");
                port::reset();
            }
            b"triple" => port::triple_fault(),
            b"verify" => {
                state::VERIFY_ASKED.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}
