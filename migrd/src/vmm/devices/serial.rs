//! COM1, both ways.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::child::console::ConsoleSink;

/// Input that waits for room in the UART, at most (bytes).
pub const QUEUE_BYTES: usize = 64 * 1024;

/// The UART's interrupt line, which KVM watches (irqfd).
#[derive(Clone, Debug)]
pub struct IrqLine(pub Arc<EventFd>);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What went wrong at the serial port.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The guest does not read.
    #[error("the guest has not read {QUEUE_BYTES} bytes of console input yet: try again later")]
    QueueFull,
    /// A saved state that no UART can have.
    #[error("the saved serial port is not valid: {0}")]
    State(String),
}

/// A 16550 with a queue of input before it.
#[derive(Debug)]
pub struct SerialPort {
    uart: Serial<IrqLine, NoEvents, ConsoleSink>,
    queue: VecDeque<u8>,
}

impl SerialPort {
    /// As after power-on.
    #[must_use]
    pub fn new(irq: IrqLine, out: ConsoleSink) -> Self {
        Self { uart: Serial::new(irq, out), queue: VecDeque::new() }
    }

    /// The machine's reset line. What was typed and not read stays.
    pub fn reset(&mut self) {
        let irq = self.uart.interrupt_evt().clone();
        let out = self.uart.writer().clone();
        self.uart = Serial::new(irq, out);
    }

    /// What travels: the registers, and the input not read yet.
    #[must_use]
    pub fn state(&self) -> (SerialState, Vec<u8>) {
        (self.uart.state(), self.queue.iter().copied().collect())
    }

    /// Becomes what was saved. Interrupts that were pending are raised again:
    /// one on its way through the irqfd at the save would be lost otherwise.
    ///
    /// # Errors
    /// When the state is none that a UART can have.
    pub fn restore(&mut self, state: &SerialState, queue: Vec<u8>) -> Result<(), SerialError> {
        if queue.len() > QUEUE_BYTES {
            return Err(SerialError::State(format!("{} bytes of queued input", queue.len())));
        }
        let invalid = |e: &dyn std::fmt::Display| SerialError::State(e.to_string());
        let irq = self.uart.interrupt_evt().clone();
        let out = self.uart.writer().clone();
        self.uart = Serial::from_state(state, irq, NoEvents, out).map_err(|e| invalid(&e))?;
        self.queue = queue.into();
        self.feed();
        Ok(())
    }

    /// The guest writes a register.
    pub fn write(&mut self, register: u16, value: u8) {
        let register = u8::try_from(register).unwrap_or(u8::MAX);
        // The sink takes everything, and the irqfd is written without waiting:
        // nothing the guest could be told about goes wrong here.
        let _ = self.uart.write(register, value);
        self.feed();
    }

    /// The guest reads a register.
    pub fn read(&mut self, register: u16) -> u8 {
        let value = self.uart.read(u8::try_from(register).unwrap_or(u8::MAX));
        self.feed();
        value
    }

    /// Input for the guest, all of it or none.
    ///
    /// # Errors
    /// When it has not read what came before.
    pub fn input(&mut self, bytes: &[u8]) -> Result<(), SerialError> {
        if self.queue.len() + bytes.len() > QUEUE_BYTES {
            return Err(SerialError::QueueFull);
        }
        self.queue.extend(bytes);
        self.feed();
        Ok(())
    }

    /// Bytes of input that the guest has not read.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Moves input into the UART as far as it has room.
    fn feed(&mut self) {
        while !self.queue.is_empty() && self.uart.fifo_capacity() > 0 {
            let room = self.uart.fifo_capacity().min(self.queue.len());
            let next: Vec<u8> = self.queue.iter().take(room).copied().collect();
            match self.uart.enqueue_raw_bytes(&next) {
                // In loop-back mode the line is cut: it stays queued.
                Ok(0) | Err(_) => return,
                Ok(taken) => drop(self.queue.drain(..taken)),
            }
        }
    }
}
