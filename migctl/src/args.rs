//! The command line: every verb, its options and its help.

mod container;
mod migrate;
mod process;
mod vm;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use container::RUN_CONTAINER_AFTER_HELP;
pub use container::{Rootfs, RunContainerArgs};
use migrate::{MIGRATE_AFTER_HELP, parse_timeout};
pub use migrate::{MigrateArgs, Mode};
use process::{ADOPT_AFTER_HELP, EXEC_PROCESS_AFTER_HELP};
pub use process::{AdoptArgs, ExecProcessArgs, ProcessArgs, ProcessNet};
pub use vm::{Cpu, Disk, Net, RunArgs};

use crate::units::{parse_address, parse_duration};

const AFTER_HELP: &str = "\
Exit status: 0 done, 1 failed, 2 wrong usage. `migrate` and `watch` have more: see `migctl migrate --help`.
Errors go to stderr: what failed, on which host, in which phase, and what to do about it.";

/// Runs, inspects and moves workloads through the migrd daemon of a host.
#[derive(Debug, Parser)]
#[command(name = "migctl", version, after_help = AFTER_HELP, propagate_version = true)]
pub struct Cli {
    /// The daemon to ask.
    #[arg(long, env = "MIGCTL_HOST", global = true, value_name = "ADDR:PORT",
          default_value = "127.0.0.1:7070", value_parser = parse_address)]
    pub host: String,
    /// What to print: text for people, or JSON for scripts.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Human)]
    pub output: Format,
    #[command(subcommand)]
    pub verb: Verb,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Text and tables.
    Human,
    /// Objects whose fields scripts may rely on.
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a VM and start it.
    #[command(
        after_help = "Example:\n  migctl run web --kernel vmlinuz --initrd initrd.img --memory 1G --cpus 2 --cmdline 'console=ttyS0'\n  migctl run db --kernel vmlinuz --memory 2G --disk db.img --disk tools.iso,ro\n  migctl run web2 --kernel vmlinuz --memory 1G --net bridge=br0 --net tap=tap7,mac=02:00:00:00:00:07"
    )]
    Run(RunArgs),
    /// Start a command as a workload: a process tree with a PID namespace of its own.
    #[command(after_help = EXEC_PROCESS_AFTER_HELP)]
    ExecProcess(ExecProcessArgs),
    /// Start an OCI bundle as a workload, by runc.
    #[command(after_help = RUN_CONTAINER_AFTER_HELP)]
    RunContainer(RunContainerArgs),
    /// Make a workload of a process that runs already, and of all below it.
    #[command(after_help = ADOPT_AFTER_HELP)]
    Adopt(AdoptArgs),
    /// List the workloads of the host.
    #[command(after_help = "Example:\n  migctl -o json list --all")]
    List(ListArgs),
    /// Show everything the daemon knows about a workload.
    #[command(after_help = "Example:\n  migctl inspect web")]
    Inspect(NameArgs),
    /// Print the output of a workload: a VM's serial line, a process tree's stdout and stderr.
    #[command(
        after_help = "The log moves with the workload: at the new host it starts with what came before,\nand --follow goes on there by itself.\n\nExample:\n  migctl logs web --follow --timestamps"
    )]
    Logs(LogsArgs),
    /// Attach to a VM's serial console or a process tree's stdin and output; follows when it moves.
    #[command(
        after_help = "With a terminal, Ctrl-] detaches (see --escape) and every other key goes to the guest.\nWithout one, all of stdin is sent and output is printed until it ends; --detach-after\nleaves that long after the end of stdin.\n\nExamples:\n  migctl console web\n  echo uptime | migctl console web --detach-after 2s"
    )]
    Console(ConsoleArgs),
    /// Move a running workload to another host.
    #[command(after_help = MIGRATE_AFTER_HELP)]
    Migrate(MigrateArgs),
    /// Ask a running migration to stop; the workload stays at the source.
    #[command(
        after_help = "Past the point of no return a migration cannot be cancelled.\n\nExample:\n  migctl cancel web"
    )]
    Cancel(NameArgs),
    /// Report on a migration that is running; exits like `migrate`.
    #[command(
        after_help = "Ctrl-C ends the watching, not the migration.\n\nExample:\n  migctl watch web"
    )]
    Watch(NameArgs),
    /// Have a workload stand still; its memory stays.
    #[command(after_help = "Example:\n  migctl pause web")]
    Pause(NameArgs),
    /// Let a paused workload go on.
    #[command(after_help = "Example:\n  migctl resume web")]
    Resume(NameArgs),
    /// Stop a workload for good; it stays listed until `rm`.
    #[command(
        after_help = "Presses a VM's power button, sends a process tree's init SIGTERM, and waits until it has ended.\nWith --force it is not asked: as if its power failed.\n\nExamples:\n  migctl stop web --timeout 2m\n  migctl stop web --force"
    )]
    Stop(StopArgs),
    /// Forget a stopped workload and delete what the daemon kept of it.
    #[command(after_help = "Example:\n  migctl rm web")]
    Rm(NameArgs),
    /// Write a snapshot of a workload to a directory on the daemon's host.
    #[command(after_help = CHECKPOINT_AFTER_HELP)]
    Checkpoint(CheckpointArgs),
    /// Start a workload from a snapshot directory on the daemon's host.
    #[command(
        after_help = "Example:\n  migctl restore --from /var/lib/snapshots/web-1 --name web2"
    )]
    Restore(RestoreArgs),
    /// Settle a workload that is in doubt, on your word.
    ///
    /// A workload is in doubt when it was handed over and the destination never
    /// confirmed. It does not run here until the daemon has heard from the
    /// destination, or until you say what is true. Look at the destination
    /// first: the daemon cannot check what you say.
    #[command(after_help = FORCE_AFTER_HELP)]
    Force(ForceArgs),
    /// Show what this host is and has, and a peer too when one is named.
    #[command(after_help = "Example:\n  migctl hosts hostb:7070")]
    Hosts(HostsArgs),
    /// Print the version of migctl, and of the daemon if it can be reached.
    #[command(after_help = "Example:\n  migctl -o json version")]
    Version,
    /// Print a completion script for a shell.
    #[command(after_help = "Example:\n  migctl completions bash > /etc/bash_completion.d/migctl")]
    Completions(CompletionsArgs),
}

const FORCE_AFTER_HELP: &str = "\
Consequences:
  --run-here  If the destination runs it too, TWO copies run, write to the same disks and
              answer on the same addresses. Make sure the destination is off for good.
  --give-up   If the destination does not run it, NO copy runs and its memory is lost.
              Make sure that the destination runs it.
While memory still follows from here (mode postcopy) both end it at the destination, which
can't go on without what it lacks; --run-here goes back to the state at the stop.

Example:
  migctl force web --run-here --yes";

const CHECKPOINT_AFTER_HELP: &str = "\
The workload stands still while it is written, and goes on, or with --stop ends as by `migctl stop
--force`. Of a process tree or container the directory has CRIU's files in DIR/images, for crit and
for `restore`.

Exit status: 0 written (with --dry-run: nothing stands in the way), 1 failed, 2 wrong usage,
3 with --dry-run: something stands in the way.

Examples:
  migctl checkpoint web --to /var/lib/snapshots/web-1
  migctl checkpoint job --to /var/lib/snapshots/job-1 --file-locks --stop
  migctl checkpoint job --to /var/lib/snapshots/job-2 --parent /var/lib/snapshots/job-1
  migctl -o json checkpoint job --to /var/lib/snapshots/job-1 --dry-run";

#[derive(Debug, Args)]
pub struct NameArgs {
    /// Name of the workload.
    pub name: String,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Also list workloads that have moved away.
    #[arg(short, long)]
    pub all: bool,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Name of the workload.
    pub name: String,
    /// Go on printing as output arrives, also at the host it moves to.
    #[arg(short, long)]
    pub follow: bool,
    /// Begin each line with the time its first byte arrived: seconds.nanoseconds since 1970.
    #[arg(short, long)]
    pub timestamps: bool,
}

#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Name of the workload.
    pub name: String,
    /// Key that detaches: ^X means Ctrl-X; none switches it off.
    #[arg(long, value_name = "KEY", default_value = "^]", value_parser = parse_escape)]
    pub escape: Escape,
    /// Detach this long after the end of stdin; by default stay until output ends.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub detach_after: Option<Duration>,
}

/// The byte that detaches a console, if any does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escape(pub Option<u8>);

fn parse_escape(text: &str) -> Result<Escape, String> {
    match text.as_bytes() {
        b"none" => Ok(Escape(None)),
        [b'^', key @ (b'@'..=b'_' | b'a'..=b'z')] => Ok(Escape(Some(key & 0x1f))),
        _ => Err(format!("{text:?} is not a control key such as ^] or ^A, nor none")),
    }
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Name of the workload.
    pub name: String,
    /// Do not ask the workload: end it at once.
    #[arg(short, long)]
    pub force: bool,
    /// How long the workload may take; by default the daemon chooses (60s).
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout, conflicts_with = "force")]
    pub timeout: Option<u64>,
}

#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// Name of the workload.
    pub name: String,
    /// Directory on the daemon's host; must not exist, or be empty.
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// A snapshot of it, the last one: only what memory has changed since is written, where
    /// the kernel tracks that. `restore` needs both directories.
    #[arg(long, value_name = "DIR")]
    pub parent: Option<PathBuf>,
    /// Let it go on when it is written; the default.
    #[arg(long, conflicts_with = "stop")]
    pub leave_running: bool,
    /// Stop it when the snapshot is complete and on disk; if that fails it goes on.
    #[arg(long)]
    pub stop: bool,
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Only say what stands in the way; touches nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Snapshot directory on the daemon's host.
    #[arg(long, value_name = "DIR")]
    pub from: PathBuf,
    /// Name of the restored workload; by default the one it had.
    #[arg(long)]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("action").required(true).args(["run_here", "give_up"])))]
pub struct ForceArgs {
    /// Name of the workload.
    pub name: String,
    /// Run it here. Two copies run if the destination runs it too.
    #[arg(long)]
    pub run_here: bool,
    /// Give it up here. None runs, and its memory is lost, if the destination does not run it.
    #[arg(long)]
    pub give_up: bool,
    /// Confirm that you have looked at the destination.
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct HostsArgs {
    /// A peer to ask about, as the daemon reaches it.
    #[arg(value_name = "PEER", value_parser = parse_address)]
    pub peer: Option<String>,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_shows_an_example() {
        for verb in Cli::command().get_subcommands() {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{} has no example", verb.get_name());
        }
    }

    #[test]
    fn control_keys_are_read_as_the_byte_they_send() {
        assert_eq!(parse_escape("^]"), Ok(Escape(Some(0x1d))));
        assert_eq!(parse_escape("^a"), Ok(Escape(Some(1))));
        assert_eq!(parse_escape("none"), Ok(Escape(None)));
        assert!(parse_escape("q").is_err());
    }
}
