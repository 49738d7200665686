//! A command that a user wants to run as a workload, checked for its form.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use migr_proto::v1 as proto;
use prost::Message;
use tonic::Status;

use super::status::invalid;
use crate::migration::destination::MAX_CONFIG;
use crate::sys::tap;
use crate::workload::vm::nets::is_name as is_interface_name;

/// The longest argument or variable that Linux passes to a program, in bytes
/// without its NUL (execve(2), `MAX_ARG_STRLEN`).
const MAX_STRING: usize = (128 << 10) - 1;
/// The longest path that Linux takes, in bytes without its NUL (`PATH_MAX`).
const MAX_PATH: usize = 4095;
/// Where programs are looked for unless the user says otherwise.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Version of the configuration.
const VERSION: u32 = 1;

/// What is wrong with an order, in words.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Senseless {
    #[error("there is no command: give it after `--`")]
    NoCommand,
    #[error("the command has no name: its first word is empty")]
    NoProgram,
    #[error("{what} is longer than {MAX_STRING} bytes or has a NUL: no program can be given that")]
    String { what: String },
    #[error("{0:?} is not of the form NAME=VALUE")]
    Variable(String),
    #[error("the variable {0:?} is given twice")]
    Twice(String),
    #[error("command and environment have more than {MAX_CONFIG} bytes together")]
    TooLong,
    #[error(
        "the directory {0:?} is not an absolute path on the daemon's host of at most {MAX_PATH} \
         bytes"
    )]
    Directory(String),
    #[error("{0:?} is not an address with its prefix length, as in 10.0.0.5/24 or fd00:1::5/64")]
    Address(String),
    #[error("{0} can't be the address of an interface: give one of a host in the bridge's network")]
    NoHost(IpAddr),
    #[error(
        "{0:?} can't be the name of a bridge: use at most {max} letters, digits, '.', '_' and '-', \
         beginning with a letter or digit",
        max = tap::NAME_MAX
    )]
    Bridge(String),
    #[error("the gateway {0:?} is not an address that {1} reaches without a gateway")]
    Gateway(String, String),
    #[error("a hardware address has six bytes and is that of one interface, not of a group")]
    Mac,
}

/// The process tree that a user asks for. Whether this host can have it is not
/// checked yet.
pub(super) fn process(
    here: &str,
    request: &proto::ExecProcessRequest,
) -> Result<proto::ProcessConfig, Status> {
    config(request).map_err(|error| invalid(here, error.to_string()))
}

/// The network of its own that a user asks for.
pub(super) fn own_network(
    here: &str,
    ordered: &proto::ProcessNet,
) -> Result<proto::ProcessNet, Status> {
    network(ordered).map_err(|error| invalid(here, error.to_string()))
}

fn config(request: &proto::ExecProcessRequest) -> Result<proto::ProcessConfig, Senseless> {
    let proto::ExecProcessRequest { name: _, argv, env, cwd, net } = request;
    match argv.first().map(String::as_str) {
        None => return Err(Senseless::NoCommand),
        Some("") => return Err(Senseless::NoProgram),
        Some(_) => {}
    }
    for (index, argument) in argv.iter().enumerate() {
        passable(argument, || format!("argument {index} of the command"))?;
    }
    let config = proto::ProcessConfig {
        version: VERSION,
        argv: argv.clone(),
        env: environment(env)?,
        cwd: directory(cwd)?,
        net: net.as_ref().map(network).transpose()?,
        container: None,
        adopted: 0,
    };
    // It travels in an offer, which has that limit.
    if config.encoded_len() > MAX_CONFIG {
        return Err(Senseless::TooLong);
    }
    Ok(config)
}

fn passable(text: &str, what: impl FnOnce() -> String) -> Result<(), Senseless> {
    if text.len() > MAX_STRING || text.contains('\0') {
        return Err(Senseless::String { what: what() });
    }
    Ok(())
}

/// All variables that the command gets: those that are ordered, and a PATH.
fn environment(ordered: &[String]) -> Result<Vec<String>, Senseless> {
    let mut names = BTreeSet::new();
    for variable in ordered {
        let name = variable.split_once('=').map(|(name, _)| name).unwrap_or_default();
        if name.is_empty() {
            // All of it may be a secret that stands in the wrong place.
            return Err(Senseless::Variable(variable.chars().take(16).collect()));
        }
        passable(variable, || format!("the variable {:?}", shortened(name)))?;
        if !names.insert(name) {
            return Err(Senseless::Twice(shortened(name)));
        }
    }
    let mut all = ordered.to_vec();
    if !names.contains("PATH") {
        all.push(DEFAULT_PATH.to_owned());
    }
    Ok(all)
}

/// Enough of a name to know which is meant.
fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

fn directory(ordered: &str) -> Result<String, Senseless> {
    match ordered {
        "" => Ok("/".to_owned()),
        path if Path::new(path).is_absolute() && path.len() <= MAX_PATH && !path.contains('\0') => {
            Ok(path.to_owned())
        }
        path => Err(Senseless::Directory(shortened(path))),
    }
}

fn network(ordered: &proto::ProcessNet) -> Result<proto::ProcessNet, Senseless> {
    let proto::ProcessNet { address, bridge, gateway, mac } = ordered;
    let (ip, bits) = address_with_prefix(address)?;
    let senseless = ip.is_unspecified()
        || ip.is_multicast()
        || ip.is_loopback()
        || ip == IpAddr::from([255, 255, 255, 255]);
    if senseless {
        return Err(Senseless::NoHost(ip));
    }
    if !is_interface_name(bridge) {
        return Err(Senseless::Bridge(shortened(bridge)));
    }
    let gateway = match gateway.as_str() {
        "" => String::new(),
        text => {
            let unreachable = || Senseless::Gateway(shortened(text), format!("{ip}/{bits}"));
            let gateway: IpAddr = text.parse().map_err(|_| unreachable())?;
            if gateway == ip || !on_link(ip, bits, gateway) {
                return Err(unreachable());
            }
            gateway.to_string()
        }
    };
    let one_interface = |mac: &[u8]| mac.len() == 6 && mac[0] & 1 == 0 && mac != [0; 6];
    if !mac.is_empty() && !one_interface(mac) {
        return Err(Senseless::Mac);
    }
    Ok(proto::ProcessNet {
        address: format!("{ip}/{bits}"),
        bridge: bridge.clone(),
        gateway,
        mac: mac.clone(),
    })
}

fn address_with_prefix(text: &str) -> Result<(IpAddr, u32), Senseless> {
    let malformed = || Senseless::Address(shortened(text));
    let (ip, bits) = text.split_once('/').ok_or_else(malformed)?;
    let ip: IpAddr = ip.parse().map_err(|_| malformed())?;
    // `parse` would take a sign.
    let digits = !bits.is_empty() && bits.bytes().all(|c| c.is_ascii_digit());
    let bits: u32 = bits.parse().map_err(|_| malformed())?;
    let width = if ip.is_ipv4() { 32 } else { 128 };
    if !digits || bits == 0 || bits > width || ip != ip.to_canonical() {
        return Err(malformed());
    }
    Ok((ip, bits))
}

/// Whether an interface with that address reaches `other` by itself.
fn on_link(ip: IpAddr, bits: u32, other: IpAddr) -> bool {
    match (ip, other) {
        (IpAddr::V4(ip), IpAddr::V4(other)) => {
            (ip.to_bits() ^ other.to_bits()).leading_zeros() >= bits
        }
        (IpAddr::V6(ip), IpAddr::V6(other)) => {
            // Link-local addresses are on every link (RFC 4291, section 2.5.6).
            other.is_unicast_link_local()
                || (ip.to_bits() ^ other.to_bits()).leading_zeros() >= bits
        }
        _ => false,
    }
}

#[cfg(test)]
#[path = "process_orders/tests.rs"]
mod tests;
