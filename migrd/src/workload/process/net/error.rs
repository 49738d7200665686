//! Why a workload can't have its network on a host, and what to do.

use std::io;
use std::net::IpAddr;

use crate::workload::vm::nets;
use crate::workload::{Problem, WorkloadError};

/// A workload can't have its network on this host.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetError {
    /// Not in any case.
    #[error(transparent)]
    Config(#[from] WorkloadError),
    /// Its bridge is not there.
    #[error(transparent)]
    Bridge(#[from] nets::NetError),
    #[error("this host's interface {interface} has the address {address}")]
    AddressTaken { interface: String, address: IpAddr },
    #[error("there is an interface {name} already")]
    NameTaken { name: String },
    #[error("the workload's interface {name} is gone, or not joined to its namespace")]
    Lost { name: String },
    #[error("cannot {what} {name}: {source}")]
    System {
        what: &'static str,
        name: String,
        #[source]
        source: io::Error,
    },
}

impl NetError {
    /// What keeps a workload from arriving here, and what to do.
    pub(super) fn problem(&self) -> Problem {
        let (code, remedy) = match self {
            Self::Config(_) => ("engine", "run the same version of migr on both hosts".to_owned()),
            Self::Bridge(error) => return error.problem(),
            Self::AddressTaken { address, interface } => (
                "destination-address-taken",
                format!("take it away there: `ip address del {address} dev {interface}`"),
            ),
            Self::NameTaken { name } => (
                "destination-network",
                format!(
                    "choose a host with a network namespace of its own; or, if no workload of \
                     that host has it, delete it there: `ip link del {name}`"
                ),
            ),
            Self::Lost { .. } => {
                ("destination-network", "start the workload again there".to_owned())
            }
            Self::System { .. } => (
                "destination-network",
                "run migrd with CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN there".to_owned(),
            ),
        };
        Problem::new(code, self.to_string(), remedy)
    }

    pub(super) fn on_this_host(self) -> WorkloadError {
        if let Self::Config(error) = self {
            return error;
        }
        let Problem { message, remedy, .. } = self.problem();
        let remedy = remedy.replace(" there", "");
        match self {
            Self::System { source, .. } => {
                WorkloadError::caused(format!("{message}; {remedy}"), source)
            }
            _ => WorkloadError::new(format!("{message}; {remedy}")),
        }
    }
}

pub(super) fn system(what: &'static str, name: &str) -> impl FnOnce(io::Error) -> NetError {
    let name = name.to_owned();
    move |source| NetError::System { what, name, source }
}
