//! What the processes that a daemon starts, and that outlive it, have in common: the
//! [`vmm`](crate::vmm) child of a VM and the [`keeper`](crate::keeper) of a process
//! tree.
//!
//! Such a process listens on a socket ([`listener`]) and serves the [`daemon`] that
//! has come last ([`serving`]), in [`frame`]s. What its guest or its processes print
//! goes over the [`console`] into the log ([`output`]). May not touch tokio, KVM, or
//! CRIU.

pub mod console;
pub mod daemon;
pub mod frame;
pub mod listener;
pub mod output;
pub mod serving;

/// An error with everything that caused it.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}
