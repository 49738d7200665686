//! The state machine driven with fake workloads through every failure, and its
//! rules explored exhaustively.

mod copies;
mod failures;
mod following;
mod model;
mod parts;
mod world;
