//! The migr control command.
fn main() {}
