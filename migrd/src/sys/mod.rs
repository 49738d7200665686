//! The only unsafe code.
//!
//! Owns system calls and ioctls that no crate wraps safely. May not touch
//! policy, logging or async code.
#![allow(unsafe_code)]

pub mod kvm_state;
