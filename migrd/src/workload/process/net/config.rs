//! What a process tree's network is to be: checked, and completed from the
//! workload's id, so that every host that has the id comes to the same.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use migr_proto::v1::ProcessNet;

use crate::sys::tap;
use crate::units::{Mac, WorkloadId, show_mac};
use crate::workload::vm::nets::{is_address, is_name};
use crate::workload::{Address, NetAddress, WorkloadError};

/// What the names of the hosts' ends begin with.
const NAME_PREFIX: &str = "mgp";
/// How many of an id's bytes a name has.
const NAME_BYTES: usize = 5;
/// Before the id in the alias of a host's end.
const ALIAS_PREFIX: &str = "migr process ";

/// A network that can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) id: WorkloadId,
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
    pub(super) gateway: Option<IpAddr>,
    pub(super) bridge: String,
    pub(super) mac: Mac,
}

impl Plan {
    /// Takes a configuration from a user, a file or a peer.
    pub(super) fn new(id: WorkloadId, config: &ProcessNet) -> Result<Self, WorkloadError> {
        let ProcessNet { address, bridge, gateway, mac } = config;
        let (address, prefix) = parse_address(address)?;
        let gateway = match gateway.as_str() {
            "" => None,
            text => Some(parse_gateway(text, address, prefix)?),
        };
        if !is_name(bridge) {
            let max = tap::NAME_MAX;
            return refuse(format!(
                "{} can't be a bridge: use at most {max} letters, digits, '.', '_' and '-', \
                 beginning with a letter or digit",
                shown(bridge)
            ));
        }
        let mac = if mac.is_empty() { mac_of(id) } else { parse_mac(mac)? };
        Ok(Self { id, address, prefix, gateway, bridge: bridge.clone(), mac })
    }

    /// The last address of an IPv4 network with more than two.
    pub(super) fn broadcast(&self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(address) if self.prefix < 31 => {
                Some(Ipv4Addr::from_bits(address.to_bits() | host_bits_v4(self.prefix)))
            }
            _ => None,
        }
    }
}

/// Whether a process tree can have this network; no host is looked at. It comes
/// from a user, a file or a peer.
///
/// # Errors
/// What can't be, and what could.
pub fn check(config: &ProcessNet) -> Result<(), WorkloadError> {
    Plan::new(WorkloadId::from_bytes([0; 16]), config).map(|_| ())
}

/// The addresses that it asks for. The hardware address is not among them where it
/// follows from the workload's id.
#[must_use]
pub fn addresses(config: &ProcessNet) -> Vec<NetAddress> {
    let ip = parse_address(&config.address).ok().map(|(ip, _)| Address::Ip(ip));
    let mac = Mac::try_from(&config.mac[..]).ok().map(Address::Hardware);
    let known = [ip, mac].into_iter().flatten();
    known.map(|address| NetAddress { bridge: config.bridge.clone(), address }).collect()
}

/// Administered by nobody (IEEE 802, 8.4), and of the workload's own. These
/// bytes of a random UUID are all random (RFC 9562, 5.4).
fn mac_of(id: WorkloadId) -> Mac {
    let [.., a, b, c, d, e] = *id.as_bytes();
    [2, a, b, c, d, e]
}

/// The name of the host's end. Two ids may have the same: the alias tells.
pub(super) fn name_of(id: WorkloadId) -> String {
    let start = id.as_bytes().iter().take(NAME_BYTES);
    start.fold(NAME_PREFIX.to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// What the host's end says it is for.
pub(super) fn alias_of(id: WorkloadId) -> String {
    format!("{ALIAS_PREFIX}{id}")
}

/// The workload that a host's end says it is for.
pub(super) fn id_in(alias: &str) -> Option<WorkloadId> {
    alias.strip_prefix(ALIAS_PREFIX)?.parse().ok()
}

fn refuse<T>(text: String) -> Result<T, WorkloadError> {
    Err(WorkloadError::new(text))
}

/// A text that may be of any length, for a message.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(50).collect::<String>())
}

fn host_bits_v4(prefix: u8) -> u32 {
    u32::MAX.checked_shr(prefix.into()).unwrap_or(0)
}

fn host_bits(like: IpAddr, prefix: u8) -> u128 {
    match like {
        IpAddr::V4(_) => host_bits_v4(prefix).into(),
        IpAddr::V6(_) => u128::MAX.checked_shr(prefix.into()).unwrap_or(0),
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn parse_address(text: &str) -> Result<(IpAddr, u8), WorkloadError> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        let digits = prefix.len() <= 3 && prefix.chars().all(|c| c.is_ascii_digit());
        Some((address.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok().filter(|_| digits)?))
    });
    let Some((address, prefix)) = parsed else {
        let text = shown(text);
        return refuse(format!(
            "{text} is no address with a prefix length: write it as 10.0.0.5/24"
        ));
    };
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix == 0 || prefix > longest {
        return refuse(format!("{address} can't have a prefix of {prefix} bits: 1 to {longest}"));
    }
    let host = host_bits(address, prefix);
    let of_the_host = bits(address) & host;
    // Networks of one or two addresses have no address for all (RFC 3021, 6164).
    let for_all = host > 1 && (of_the_host == 0 || (address.is_ipv4() && of_the_host == host));
    if for_all || !is_of_one_host(address) {
        return refuse(format!(
            "{address}/{prefix} can't be a workload's address: give that of one host in its \
             network, which is not link-local"
        ));
    }
    Ok((address, prefix))
}

/// Whether it can be one host's on a network that has others.
fn is_of_one_host(address: IpAddr) -> bool {
    let odd = address.is_unspecified() || address.is_loopback() || address.is_multicast();
    let kind = match address {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_broadcast(),
        // Link-local ones are the interface's own.
        IpAddr::V6(v6) => v6.to_ipv4_mapped().is_some() || v6.is_unicast_link_local(),
    };
    !odd && !kind
}

fn parse_gateway(text: &str, address: IpAddr, prefix: u8) -> Result<IpAddr, WorkloadError> {
    let Ok(gateway) = text.parse::<IpAddr>() else {
        return refuse(format!("{} is no gateway: give an address", shown(text)));
    };
    let same_kind = gateway.is_ipv4() == address.is_ipv4();
    let near = same_kind && (bits(gateway) ^ bits(address)) & !host_bits(address, prefix) == 0;
    let link_local = matches!(gateway, IpAddr::V6(v6) if v6.is_unicast_link_local());
    if gateway == address {
        return refuse(format!("{gateway} can't be both the workload's address and its gateway"));
    }
    let possible = (near && is_of_one_host(gateway)) || (same_kind && link_local);
    if !possible {
        return refuse(format!(
            "the gateway {gateway} is not in the network of {address}/{prefix}"
        ));
    }
    Ok(gateway)
}

fn parse_mac(mac: &[u8]) -> Result<Mac, WorkloadError> {
    match Mac::try_from(mac) {
        Ok(possible) if is_address(possible) => Ok(possible),
        _ => refuse(format!("{} can't be an interface's address", show_mac(mac))),
    }
}

/// The address that IPv6 derives from a hardware address (RFC 4291, appendix A).
pub(super) fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let pair = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, f))
}

#[cfg(test)]
mod tests;
