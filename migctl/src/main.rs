//! The migr control command: one module a verb in `commands`, which asks the
//! daemon through `client` and prints through `output`.

mod args;
mod client;
mod commands;
mod failure;
mod follow;
mod output;
mod progress;
mod terminal;
mod track;
mod units;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let format = cli.output;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            failure::to_stderr(&format!("migctl: cannot start: {error}"));
            return ExitCode::from(failure::exit::FAILED);
        }
    };
    let result = runtime.block_on(commands::run(cli));
    // A name lookup may still be waiting in the background; nobody needs it.
    runtime.shutdown_background();
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            failure.report(format);
            ExitCode::from(failure.exit_status())
        }
    }
}
