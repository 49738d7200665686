//! What a workload is known by in the networks of its host: no other there may have one
//! of these.

use std::fmt;
use std::net::IpAddr;

use crate::units::{Mac, show_mac};

/// An address in one network of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetAddress {
    /// The bridge that the network is joined by; empty: it does not matter.
    pub bridge: String,
    /// The address.
    pub address: Address,
}

/// What others in a network know a workload by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Of its interface (IEEE 802, 8.2).
    Hardware(Mac),
    /// Of the internet protocol.
    Ip(IpAddr),
    /// The name of the host's end of a VM's interface.
    Tap(String),
}

impl fmt::Display for NetAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Hardware(mac) => write!(f, "the hardware address {}", show_mac(mac))?,
            Address::Ip(ip) => write!(f, "the address {ip}")?,
            Address::Tap(name) => write!(f, "the tap {name}")?,
        }
        match self.bridge.as_str() {
            "" => Ok(()),
            bridge => write!(f, " in the bridge {bridge}"),
        }
    }
}
