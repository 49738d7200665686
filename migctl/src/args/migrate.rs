//! What the command line says of a migration.

use clap::{Args, ValueEnum};

use super::process::ProcessArgs;
use crate::units::{parse_address, parse_duration};

pub(super) const MIGRATE_AFTER_HELP: &str = "\
Exit status:
  0    completed: it runs at the destination (with --dry-run: nothing stands in the way)
  1    the daemon could not be asked; nothing was started
  2    wrong usage
  3    refused before anything was touched; the result lists what stands in the way
  4    failed, and still at the source
  5    cancelled, and still at the source
  6    in doubt: the destination did not confirm, or the daemon could not be asked again
  130  detached by a second Ctrl-C; the migration goes on

The first Ctrl-C asks the daemon to cancel and waits for the result.

Examples:
  migctl migrate web --to hostb:7070
  migctl migrate web --to hostb:7070 --max-downtime 20ms --verify
  migctl migrate job --to hostb:7070 --file-locks --ghost-limit 16M
  migctl -o json migrate web --to hostb:7070 --dry-run";

/// How memory gets to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Copy while it runs, then stop it for what is left.
    Precopy,
    /// Stop it, then copy everything.
    Stop,
    /// Hand over first and fetch memory when it is needed, of process trees and containers.
    /// Until all has come, the loss of either host loses the workload.
    Postcopy,
    /// One pass of pre-copy, then post-copy.
    Hybrid,
}

#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Name of the workload.
    pub name: String,
    /// The daemon to move it to, as the daemon at the source reaches it.
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    pub to: String,
    /// How memory gets to the destination; by default the best way that the workload has:
    /// precopy for VMs, and for large process trees and containers whose memory the kernel
    /// tracks, else stop.
    #[arg(long, value_enum)]
    pub mode: Option<Mode>,
    /// Stop the workload when this downtime is predicted; by default 50ms for VMs, and as
    /// short as can be for process trees and containers.
    #[arg(long, value_name = "DURATION", value_parser = parse_downtime)]
    pub max_downtime: Option<u32>,
    /// Give up, and stay at the source, when it takes longer.
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    pub timeout: Option<u64>,
    /// Compare hashes of all memory at both ends while it is stopped (adds to the downtime).
    #[arg(long)]
    pub verify: bool,
    /// Send the disks too: for hosts that share no storage.
    #[arg(long)]
    pub copy_disks: bool,
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Only say what would happen and what stands in the way; touches nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// A downtime budget in whole microseconds.
fn parse_downtime(text: &str) -> Result<u32, String> {
    let duration = parse_duration(text).map_err(|error| error.to_string())?;
    match u32::try_from(duration.as_micros()) {
        Ok(0) => Err("the shortest downtime that can be asked for is 1us".to_owned()),
        Ok(us) => Ok(us),
        Err(_) => Err(format!("the longest downtime that can be asked for is {}us", u32::MAX)),
    }
}

/// A time limit in milliseconds, rounded up so that it never becomes "none".
pub(super) fn parse_timeout(text: &str) -> Result<u64, String> {
    let duration = parse_duration(text).map_err(|error| error.to_string())?;
    u64::try_from(duration.as_micros().div_ceil(1000))
        .map_err(|_| format!("{text:?} is longer than can be counted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_never_round_to_the_daemons_default() {
        assert_eq!(parse_downtime("50ms"), Ok(50_000));
        assert!(parse_downtime("1ns").is_err());
        assert!(parse_downtime("2h").is_err());
        assert_eq!(parse_timeout("1us"), Ok(1));
    }
}
