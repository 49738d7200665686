//! The migctl binary, run against fake daemons: what it prints and how it exits.

mod console;
mod fake;
mod logs;
mod migrate;
mod processes;
mod verbs;
