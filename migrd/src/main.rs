//! `migrd`: the daemon, and the VMM children it starts from its own binary.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use migrd::config::ServeArgs;
use tracing_subscriber::EnvFilter;

/// Runs virtual machines and moves them to other hosts while they run.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve clients and peers until SIGTERM or SIGINT; workloads go on after that.
    Serve(ServeArgs),
    /// One virtual machine; the daemon starts it.
    #[command(hide = true)]
    VmmChild,
    /// One process tree; the daemon starts it.
    #[command(hide = true)]
    ProcessKeeper(migrd::keeper::entry::KeeperArgs),
    /// The first moments of a process tree; its keeper starts it.
    #[command(hide = true)]
    ProcessInit,
    /// What runc takes for CRIU; runc starts it.
    #[command(hide = true)]
    CriuRelay(migrd::keeper::container::ShimArgs),
    /// What is above the processes that were adopted; their keeper starts it.
    #[command(hide = true)]
    ProcessReaper {
        /// The first of them.
        root: u32,
    },
}

fn main() -> ExitCode {
    let result: anyhow::Result<()> = match Args::parse().command {
        Command::Serve(args) => serve(args),
        Command::VmmChild => migrd::vmm::entry::run().map_err(Into::into),
        Command::ProcessKeeper(args) => migrd::keeper::entry::run(&args).map_err(Into::into),
        Command::CriuRelay(args) => migrd::keeper::container::shim(&args).map_err(Into::into),
        Command::ProcessInit => {
            return exit_code(migrd::keeper::init::run());
        }
        Command::ProcessReaper { root } => match migrd::keeper::reaper::run(root) {
            Ok(status) => return exit_code(status),
            Err(error) => Err(error.into()),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("migrd: {e}");
            ExitCode::FAILURE
        }
    }
}

fn exit_code(status: i32) -> ExitCode {
    u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("MIGRD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    end_at_a_panic();
    migrd::sys::heap::keep_freed_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let shutdown = shutdown()?;
        migrd::serve::serve(args, shutdown, |address| {
            // For scripts that let the kernel choose the port.
            let mut out = std::io::stdout();
            let _ = writeln!(out, "listening on {address}").and_then(|()| out.flush());
        })
        .await?;
        Ok(())
    })
}

/// A panic anywhere ends the daemon: VMs go on without it, and its next start
/// finds in the journal what has to be done. Half a daemon would not know.
fn end_at_a_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

/// Resolves at SIGTERM or SIGINT.
fn shutdown() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
