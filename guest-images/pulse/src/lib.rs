//! The pulse guest: a freestanding PVH image that fills memory, keeps rewriting it and says
//! on its serial line when a byte is not what it wrote or when a clock goes backwards.
//!
//! `build.rs` builds the image from `guest/`; this crate carries it as bytes, for tests, the
//! demo and the benchmarks. `README.md` describes the command line, the output and what
//! exactly the guest guarantees.

use std::io;
use std::path::Path;

/// The image: a static x86-64 ELF with a PVH entry note.
pub static ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pulse.elf"));

/// Writes the image to `path`, replacing what is there.
///
/// # Errors
/// Those of creating and writing the file.
pub fn write_image(path: &Path) -> io::Result<()> {
    std::fs::write(path, ELF)
}

// The guest's modules that touch no hardware, compiled for the host to be tested here.
#[cfg(test)]
#[path = "../guest/pattern.rs"]
mod pattern;
#[cfg(test)]
#[path = "../guest/plan.rs"]
mod plan;
#[cfg(test)]
#[path = "../guest/settings.rs"]
mod settings;
#[cfg(test)]
mod tests;
