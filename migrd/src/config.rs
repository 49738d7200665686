//! What the daemon is started with, checked.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::wire::limits;

/// Options of `migrd serve`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Address to serve clients and peers on, e.g. 127.0.0.1:7070.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Directory for the journal and the VMs' sockets and logs; made if missing.
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Serve without TLS; for a loopback address only.
    #[arg(long)]
    pub insecure: bool,
    /// Connections that carry the pages of one migration (1 to 16).
    #[arg(long, value_name = "N", default_value_t = default_lanes(), value_parser = clap::value_parser!(u32).range(1..=16))]
    pub lanes: u32,
}

/// As many as CPUs, within reason: on two more lanes only get in each other's way.
fn default_lanes() -> u32 {
    crate::sys::cpus().clamp(2, limits::DEFAULT_LANES)
}

/// The daemon can't be started so.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No security was chosen.
    #[error(
        "migrd does not speak TLS yet, so it serves only with --insecure, and that only on a \
         loopback address: anybody who reaches its port can read and take every workload"
    )]
    NoSecurity,
    /// Others could reach it.
    #[error(
        "--insecure is for loopback addresses only and {0} is not one: anybody who reaches it \
         could read and take every workload; listen on 127.0.0.1 and join hosts by an encrypted \
         tunnel"
    )]
    NotLoopback(SocketAddr),
}

impl ServeArgs {
    /// Whether it is safe to serve so.
    ///
    /// # Errors
    /// Why it is not.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !self.insecure {
            return Err(ConfigError::NoSecurity);
        }
        if !self.listen.ip().is_loopback() {
            return Err(ConfigError::NotLoopback(self.listen));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(listen: &str, insecure: bool) -> ServeArgs {
        let listen = listen.parse().expect("an address");
        ServeArgs { listen, state_dir: "/nowhere".into(), insecure, lanes: 2 }
    }

    #[test]
    fn only_loopback_is_served_without_security() {
        assert!(args("127.0.0.1:0", true).check().is_ok());
        assert!(args("[::1]:7070", true).check().is_ok());
        for (listen, insecure) in
            [("127.0.0.1:1", false), ("0.0.0.0:1", true), ("192.0.2.1:1", true), ("[::]:1", true)]
        {
            assert!(args(listen, insecure).check().is_err(), "{listen}");
        }
    }
}
