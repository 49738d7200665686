//! The devices that KVM does not emulate itself.
//!
//! Owns their registers and queues. May not touch KVM, but for raising an
//! interrupt through an eventfd, nor any file but those it was given.

pub mod clock_chip;
pub mod i8042;
pub mod power_button;
pub mod serial;
