//! The state machine driven with fake workloads through every failure.

mod failures;
mod world;
