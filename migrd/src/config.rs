//! What the daemon is started with, checked.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::network::Network;
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
    /// Serve without TLS; for a loopback address, or one in a trusted network.
    #[arg(long)]
    pub insecure: bool,
    /// With --insecure: a network, e.g. 10.99.0.0/24, whose every member may do
    /// everything here. Nobody from outside of it is served.
    #[arg(long, value_name = "ADDR/BITS", requires = "insecure")]
    pub trust_network: Option<Network>,
    /// Connections that carry the pages of one migration (1 to 16).
    #[arg(long, value_name = "N", default_value_t = default_lanes(), value_parser = clap::value_parser!(u32).range(1..=16))]
    pub lanes: u32,
    /// The CRIU that process trees are saved and restored with; without it, `criu`
    /// in PATH. A host without any runs no process trees.
    #[arg(long, value_name = "PATH", env = "MIGR_CRIU")]
    pub criu: Option<PathBuf>,
    /// The runc that makes containers; without it, `runc` in PATH. A host without
    /// any runs no containers.
    #[arg(long, value_name = "PATH", env = "MIGR_RUNC")]
    pub runc: Option<PathBuf>,
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
         tunnel, or name with --trust-network the network that only trusted hosts are in"
    )]
    NotLoopback(SocketAddr),
    /// The trusted network is another one.
    #[error(
        "--listen {0} is not an address in the trusted network {1}: listen on the one that this \
         host has there"
    )]
    NotInNetwork(SocketAddr, Network),
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
        match self.trust_network {
            _ if self.listen.ip().is_loopback() => Ok(()),
            None => Err(ConfigError::NotLoopback(self.listen)),
            Some(network) if network.contains(self.listen.ip()) => Ok(()),
            Some(network) => Err(ConfigError::NotInNetwork(self.listen, network)),
        }
    }

    /// Whether somebody at that address is served.
    #[must_use]
    pub fn serves(&self, client: IpAddr) -> bool {
        // From this host, whatever address it listens on.
        client.to_canonical().is_loopback()
            || client.to_canonical() == self.listen.ip().to_canonical()
            || self.trust_network.is_some_and(|network| network.contains(client))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(listen: &str, insecure: bool) -> ServeArgs {
        let listen = listen.parse().expect("an address");
        let state_dir = "/nowhere".into();
        ServeArgs {
            listen,
            state_dir,
            insecure,
            trust_network: None,
            lanes: 2,
            criu: None,
            runc: None,
        }
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

    #[test]
    fn a_trusted_network_is_served_and_nobody_else() {
        let trusting = |listen: &str| {
            let network = "10.99.0.0/24".parse().expect("a network");
            ServeArgs { trust_network: Some(network), ..args(listen, true) }
        };
        assert!(trusting("10.99.0.1:7070").check().is_ok());
        assert!(trusting("127.0.0.1:7070").check().is_ok());
        for listen in ["0.0.0.0:7070", "[::]:7070", "10.99.1.1:7070"] {
            let refused = trusting(listen).check();
            assert!(matches!(refused, Err(ConfigError::NotInNetwork(..))), "{listen}");
        }
        let unsafe_in_any_case = ServeArgs { insecure: false, ..trusting("10.99.0.1:7070") };
        assert!(unsafe_in_any_case.check().is_err());

        let serves =
            |client: &str| trusting("10.99.0.1:7070").serves(client.parse().expect("an address"));
        assert!(serves("10.99.0.1") && serves("10.99.0.2") && serves("127.0.0.1"));
        assert!(!serves("10.99.1.2") && !serves("192.0.2.1") && !serves("fe80::1"));
        assert!(!args("127.0.0.1:1", true).serves("192.0.2.1".parse().expect("an address")));
    }
}
