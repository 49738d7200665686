//! The only unsafe code: what the kernel offers, behind safe types.
//!
//! Owns system calls and mappings. May not touch policy, logging or async:
//! nothing here decides anything, it either does what it was asked or says why
//! it could not.

#![allow(unsafe_code)]

pub mod fds;
pub mod kvm_state;
pub mod mapping;
pub mod memfd;
pub mod process;
pub mod vm;
