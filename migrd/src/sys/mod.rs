//! The only unsafe code: what the kernel offers, behind safe types.
//!
//! Owns system calls and mappings. May not touch policy, logging or async:
//! nothing here decides anything, it either does what it was asked or says why
//! it could not.

#![allow(unsafe_code)]

pub mod block;
pub mod fds;
pub mod heap;
pub mod kvm_state;
pub mod mapping;
pub mod memfd;
pub mod namespace;
pub mod netns;
pub mod process;
pub mod sockets;
pub mod tap;
pub mod timers;
pub mod tmpfs;
pub mod vm;
pub mod volume;

/// The running kernel's release (uname(2)); empty if it does not say.
#[must_use]
pub fn kernel_release() -> String {
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned());
    release.unwrap_or_default()
}

/// How many CPUs this process may use.
#[must_use]
pub fn cpus() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cpus).unwrap_or(u32::MAX)
}

/// Fills `into`, at most 256 bytes, with random bytes of the kernel's
/// (getrandom(2)).
///
/// # Errors
/// What getrandom(2) says.
pub fn random(into: &mut [u8]) -> std::io::Result<()> {
    // SAFETY: the kernel writes at most as many bytes as there are.
    let got = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), 0) };
    match usize::try_from(got) {
        Ok(got) if got == into.len() => Ok(()),
        Ok(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(std::io::Error::last_os_error()),
    }
}
