//! The migctl binary, run against fake daemons: what it prints and how it exits.

mod adopt;
mod console;
mod containers;
mod fake;
mod logs;
mod migrate;
mod processes;
mod verbs;
