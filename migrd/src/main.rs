//! `migrd`: the daemon, and the VMM children it starts from its own binary.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs virtual machines and moves them to other hosts while they run.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One virtual machine; the daemon starts it.
    #[command(hide = true)]
    VmmChild,
}

fn main() -> ExitCode {
    let result: anyhow::Result<()> = match Args::parse().command {
        Command::VmmChild => migrd::vmm::entry::run().map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("migrd: {e:#}");
            ExitCode::FAILURE
        }
    }
}
