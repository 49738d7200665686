//! The one migration state machine, for every kind of workload.
//!
//! Owns the order of phases, abort and commit. [`source::run`] and
//! [`destination::Arrivals`] are the two halves; `journal` is what survives a
//! crash. May not touch tonic, KVM, CRIU or libc: the peer is a
//! [`link::Peer`], the workload a [`crate::workload::Workload`].
//!
//! ```text
//! source       Running(e) → Offered → Precopy → Stopped → Released(e+1) → Gone
//!                  ↑___________abort____________|            |
//!                  ↑_______peer promised never to run________| (e+2)
//! destination  Accepted → Receiving → Sealed(e+1) → Owned(e+1) → Running
//!                  |__________|___________|→ Discarded
//! ```

pub mod destination;
mod failpoint;
pub mod journal;
pub mod link;
pub mod mode;
pub mod phase;
pub mod plan;
pub mod policy;
pub mod recovery;
pub mod source;

#[cfg(test)]
mod tests;
