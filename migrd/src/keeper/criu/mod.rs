//! CRIU, asked over its RPC interface.
//!
//! Owns the `criu swrk` process of one dump or restore ([`session`]), the
//! messages on its socket ([`rpc`]), what is known about the CRIU of this host
//! ([`facts`]) and what a failure means to the user ([`failure`]). Decides
//! nothing: what CRIU is asked to do, and what becomes of a tree whose CRIU died,
//! is the caller's business.

pub mod facts;
pub mod failure;
pub mod pages;
pub mod rpc;
pub mod session;

pub use facts::{Criu, Features, Unusable, Version};
pub use failure::{Failure, Log};
pub use session::{CriuError, Event, Launch, Session};
