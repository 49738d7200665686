//! What the preflight says of real process trees, and what CRIU says of the
//! same ones: a problem that CRIU does not have is a false alarm.

mod carried;
mod files;
mod harness;
mod outside;
mod refused;
