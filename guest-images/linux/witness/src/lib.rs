//! witness: what a Linux guest runs so that a migration that harms it is noticed.
//!
//! In the guest, [`guest`] starts everything at once: [`records`] appends checksummed records
//! to the disk and syncs each, [`clocks`] passes the time round all CPUs to see whether it ever
//! goes back, [`server`] tells a client over TCP what both have seen, and a heartbeat goes to the
//! console. On a host, [`client`] keeps one connection and checks every byte of it.
//!
//! [`record`] and [`frame`] are the formats, pure, over [`pattern`], which says what each byte
//! must be. [`memory`] dirties memory and gives it back. [`stop`] turns signals into a flag.
//!
//! Nothing here is trusted by migr: it is a test's evidence, and runs where it is put.

pub mod client;
pub mod clocks;
pub mod frame;
pub mod guest;
pub mod memory;
pub mod pattern;
pub mod record;
pub mod records;
pub mod server;
pub mod stop;

mod fields;
