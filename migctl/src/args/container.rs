//! What the command line says of containers.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::process::{ProcessNet, parse_process_net};

pub(super) const RUN_CONTAINER_AFTER_HELP: &str = "\
DIR is an OCI bundle on the daemon's host: a directory with a config.json, which `runc spec` makes,
and a root file system; runc makes the container. \"terminal\" must be false: stdout and
stderr are in `migctl logs`. What runc calls the container is in `migctl inspect`.

With --rootfs copy its root file system is sent along when it moves, while it runs; what it has
changed by then follows at the stop. The bundle stays as it is; the copy is deleted when the
container leaves that host.

With --net the container gets a network of its own, whose address and connections move with it.

Examples:
  migctl run-container web --bundle /srv/web
  migctl run-container web --bundle /srv/web --rootfs copy
  migctl run-container web --bundle /srv/web --net ip=10.0.0.5/24,bridge=br0";

#[derive(Debug, Args)]
pub struct RunContainerArgs {
    /// Name of the new workload.
    pub name: String,
    /// The OCI bundle, on the daemon's host.
    #[arg(long, value_name = "DIR")]
    pub bundle: PathBuf,
    /// How its root file system gets to another host.
    #[arg(long, value_enum, default_value_t = Rootfs::Shared)]
    pub rootfs: Rootfs,
    /// A network of its own, joined to a bridge of the host; it moves with its address.
    #[arg(long, value_name = "ip=ADDR/LEN,bridge=BR[,gateway=ADDR][,mac=MAC]",
          value_parser = parse_process_net)]
    pub net: Option<ProcessNet>,
}

/// How a root file system gets to another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rootfs {
    /// It is there under the same path: shared storage, or a copy
    Shared,
    /// It is sent with the container, into a directory of the other migrd's own
    Copy,
}
