//! Owns what appears on stdout: one result a command, for people or scripts.
//! It may not talk to a daemon nor decide an exit status.

pub mod human;
pub mod json;

use std::io::{self, Write};

use serde::Serialize;

use crate::args::Format;
use crate::failure::Failure;

/// Prints the result of a command: `json` as one object, or the text `human` makes.
pub fn print(
    format: Format,
    json: &impl Serialize,
    human: impl FnOnce() -> String,
) -> Result<(), Failure> {
    let text = match format {
        Format::Human => human(),
        Format::Json => {
            serde_json::to_string(json).map_err(|error| Failure::Stdout(error.into()))?
        }
    };
    write_out(format!("{text}\n").as_bytes())
}

/// Writes bytes to stdout at once.
pub fn write_out(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(Failure::Stdout)
}
