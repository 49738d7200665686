//! `completions`: a script for a shell.

use clap::CommandFactory;

use crate::args::{Cli, CompletionsArgs};
use crate::failure::{Failure, exit};
use crate::output::write_out;

pub fn run(args: &CompletionsArgs) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "migctl", &mut script);
    write_out(&script)?;
    Ok(exit::DONE)
}
