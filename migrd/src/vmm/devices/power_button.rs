//! The power button, and how the guest learns that it was pressed.
//!
//! A press raises the interrupt of the generic event device (ACPI 6.5, 5.6.9).
//! Its method in the DSDT reads [`EVENTS`], which tells what has happened and
//! forgets it, and notifies the button (5.6.6, 0x80). So it is known whether
//! the guest has taken a press in, and one that it has not travels with it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// I/O port of the register of events, one byte; a read empties it.
pub const EVENTS: u16 = 0x602;
/// Bit of [`EVENTS`]: the power button was pressed.
pub const PRESSED: u8 = 1;
/// The interrupt of the generic event device: a pin of the IOAPIC that no
/// other device has, edge-triggered.
pub const GSI: u32 = 14;

/// The button.
#[derive(Debug)]
pub struct PowerButton {
    pressed: AtomicBool,
    /// KVM watches it (irqfd).
    line: EventFd,
}

impl PowerButton {
    /// Not pressed; `line` is its interrupt.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self { pressed: AtomicBool::new(false), line }
    }

    /// Presses it.
    ///
    /// # Errors
    /// When the interrupt can't be raised.
    pub fn press(&self) -> io::Result<()> {
        self.pressed.store(true, Ordering::SeqCst);
        self.line.write(1)
    }

    /// Whether the guest has not yet seen that it was pressed.
    #[must_use]
    pub fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::SeqCst)
    }

    /// The guest reads [`EVENTS`].
    pub fn take_events(&self) -> u8 {
        if self.pressed.swap(false, Ordering::SeqCst) { PRESSED } else { 0 }
    }

    /// The machine's reset line: nothing was pressed.
    pub fn reset(&self) {
        self.pressed.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn a_press_is_told_once_and_raises_the_interrupt() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let button = PowerButton::new(line.try_clone().unwrap());
        assert_eq!(button.take_events(), 0);
        button.press().unwrap();
        assert!(button.is_pressed());
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!((button.take_events(), button.take_events()), (PRESSED, 0));
        assert!(!button.is_pressed());
    }

    #[test]
    fn a_reset_forgets_the_press() {
        let button = PowerButton::new(EventFd::new(EFD_NONBLOCK).unwrap());
        button.press().unwrap();
        button.reset();
        assert_eq!(button.take_events(), 0);
    }
}
