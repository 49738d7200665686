//! Network interfaces of VMs: their taps on this host.
//!
//! A tap is found by its name. Where the VM names a bridge too, a tap that is
//! not there is made and put into the bridge; it goes when nobody has it open
//! any more, which is when the VM is gone from here.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use migr_proto::v1::NetConfig;

use super::child::{Backing, Child, Device};
use super::told;
use crate::sys::tap::{self, Interface};
use crate::units::{Mac, show_mac};
use crate::vmm::virtio::net::HEADER_BYTES;
use crate::workload::{Address, NetAddress, Problem, WorkloadError};

/// The most network interfaces of a VM.
pub const MAX_NETS: usize = 4;

/// A network interface can't be had on this host.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No such tap, and no bridge for which one could be made.
    #[error("there is no tap {tap}")]
    NoTap {
        /// Its name.
        tap: String,
    },
    /// Another kind of interface has the name.
    #[error("the interface {name} is no tap")]
    NotTap {
        /// Its name.
        name: String,
    },
    /// Somebody else is behind the tap.
    #[error("the tap {tap} is in use by another VM or process")]
    Busy {
        /// Its name.
        tap: String,
    },
    /// No such bridge.
    #[error("there is no bridge {bridge}")]
    NoBridge {
        /// Its name.
        bridge: String,
    },
    /// Another kind of interface has the name.
    #[error("the interface {name} is no bridge")]
    NotBridge {
        /// Its name.
        name: String,
    },
    /// An interface of this host has the address that one inside is to have.
    #[error("this host's interface {interface} has the hardware address {}", show_mac(.mac))]
    HardwareTaken {
        /// The interface.
        interface: String,
        /// Its address.
        mac: Mac,
    },
    /// The tap is a port of another bridge.
    #[error("the tap {tap} is in the bridge {found}, not in {bridge}")]
    OtherBridge {
        /// Its name.
        tap: String,
        /// The bridge it should be in.
        bridge: String,
        /// The bridge it is in.
        found: String,
    },
    /// No taps at all.
    #[error("this host has no {}", tap::DEVICE)]
    NoDevice,
    /// The system refused.
    #[error("cannot {what} {name}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With which interface.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl NetError {
    /// What keeps a VM from arriving here, and what to do.
    pub(in crate::workload) fn problem(&self) -> Problem {
        let (code, remedy) = match self {
            Self::NoTap { tap } => (
                "destination-tap-missing",
                format!(
                    "make it there (`ip tuntap add dev {tap} mode tap`) and put it where it belongs"
                ),
            ),
            Self::NotTap { name } => {
                let remedy = format!(
                    "rename the interface {name} there if that can be, or start the VM with a tap \
                     of another name"
                );
                ("destination-tap-missing", remedy)
            }
            Self::Busy { .. } => ("destination-tap-busy", "stop what uses it there".to_owned()),
            Self::NoBridge { bridge } => (
                "destination-bridge-missing",
                format!("make it there: `ip link add {bridge} type bridge`"),
            ),
            Self::NotBridge { name } => (
                "destination-bridge-missing",
                format!(
                    "rename the interface {name} there if that can be, or start the workload with \
                     a bridge of another name"
                ),
            ),
            Self::HardwareTaken { .. } => (
                "destination-address-taken",
                "give that interface another address there (`ip link set dev IF address MAC`), or \
                 start the workload with another mac="
                    .to_owned(),
            ),
            Self::OtherBridge { tap, bridge, .. } => (
                "destination-tap-busy",
                format!("take it out of there: `ip link set {tap} master {bridge}`"),
            ),
            Self::NoDevice => ("destination-tap", "load the module tun there".to_owned()),
            Self::System { .. } => {
                ("destination-tap", "run migrd with CAP_NET_ADMIN there".to_owned())
            }
        };
        Problem::new(code, self.to_string(), remedy)
    }

    fn on_this_host(&self) -> WorkloadError {
        let Problem { message, remedy, .. } = self.problem();
        let remedy = match self {
            Self::NotTap { .. } => "name a tap".to_owned(),
            Self::NotBridge { .. } => "name a bridge".to_owned(),
            Self::HardwareTaken { .. } => "give it another mac=".to_owned(),
            _ => remedy.replace(" there", ""),
        };
        WorkloadError::new(format!("{message}; {remedy}"))
    }
}

/// Whether a VM can have these interfaces; no host is looked at. They come from
/// a user, a snapshot or a peer.
///
/// # Errors
/// What can't be, and what could.
pub fn check(nets: &[NetConfig]) -> Result<(), WorkloadError> {
    let refuse = |text: String| Err(WorkloadError::new(text));
    if nets.len() > MAX_NETS {
        let count = nets.len();
        return refuse(format!("{count} network interfaces are not possible: at most {MAX_NETS}"));
    }
    for (index, net) in nets.iter().enumerate() {
        let NetConfig { tap, bridge, mac } = net;
        let odd = if is_name(tap) { Some(bridge).filter(|b| !b.is_empty()) } else { Some(tap) };
        if let Some(name) = odd.filter(|name| !is_name(name)) {
            let shown: String = name.chars().take(40).collect();
            return refuse(format!(
                "{shown:?} can't be an interface: use at most {} letters, digits, '.', '_' and \
                 '-', beginning with a letter or digit",
                tap::NAME_MAX
            ));
        }
        if !Mac::try_from(&mac[..]).is_ok_and(is_address) {
            return refuse(format!("{} can't be an interface's address", show_mac(mac)));
        }
        if nets[..index].iter().any(|other| other.tap == *tap) {
            return refuse(format!("the tap {tap} is named twice: each interface needs its own"));
        }
        if nets[..index].iter().any(|other| other.mac == *mac) {
            return refuse(format!("the address {} is given twice", show_mac(mac)));
        }
    }
    Ok(())
}

/// The addresses of interfaces in the bridges that are named, and the taps of all.
pub(super) fn addresses(nets: &[NetConfig]) -> Vec<NetAddress> {
    let joined = nets.iter().filter(|net| !net.bridge.is_empty());
    let known = joined.filter_map(|net| {
        let address = Address::Hardware(Mac::try_from(&net.mac[..]).ok()?);
        Some(NetAddress { bridge: net.bridge.clone(), address })
    });
    let tap = |net: &NetConfig| Address::Tap(net.tap.clone());
    let taps = nets.iter().map(|net| NetAddress { bridge: String::new(), address: tap(net) });
    known.chain(taps).collect()
}

/// Whether an interface may be named so: what Linux takes, in characters that are
/// plain in every tool.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    first && name.len() <= tap::NAME_MAX && name.chars().all(plain)
}

/// Of one interface, and not zero.
pub(in crate::workload) fn is_address(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != Mac::default()
}

/// Fills in what a user left open: an address that nobody else has, and with a
/// bridge a name.
pub fn complete(net: &mut NetConfig) {
    let random = uuid::Uuid::new_v4().into_bytes();
    if net.mac.is_empty() {
        // Administered by nobody (IEEE 802, 8.4).
        net.mac = [2, random[0], random[1], random[2], random[3], random[4]].to_vec().into();
    }
    if net.tap.is_empty() && !net.bridge.is_empty() {
        let [a, b, c] =
            [net.mac.get(3), net.mac.get(4), net.mac.get(5)].map(|byte| byte.copied().unwrap_or(0));
        net.tap = format!("migr{a:02x}{b:02x}{c:02x}{:02x}", random[5]);
    }
}

/// What keeps a VM with these interfaces from arriving on this host. Nothing is
/// changed.
#[must_use]
pub fn problems(nets: &[NetConfig]) -> Vec<Problem> {
    if nets.is_empty() {
        return Vec::new();
    }
    if !Path::new(tap::DEVICE).exists() {
        return vec![NetError::NoDevice.problem()];
    }
    nets.iter().filter_map(|net| look(net).err()).map(|error| error.problem()).collect()
}

/// Says whether the tap is there.
fn look(net: &NetConfig) -> Result<bool, NetError> {
    let NetConfig { tap, bridge, mac } = net;
    if !bridge.is_empty() {
        if let Ok(mac) = Mac::try_from(&mac[..]) {
            hardware_is_free(mac)?;
        }
        match seen(bridge)? {
            Some(Interface::Bridge) => {}
            Some(Interface::Tap { .. } | Interface::Other) => {
                return Err(NetError::NotBridge { name: bridge.clone() });
            }
            None => return Err(NetError::NoBridge { bridge: bridge.clone() }),
        }
    }
    match seen(tap)? {
        None if bridge.is_empty() => Err(NetError::NoTap { tap: tap.clone() }),
        None => Ok(false),
        Some(Interface::Tap { busy: true }) => Err(NetError::Busy { tap: tap.clone() }),
        Some(Interface::Tap { busy: false }) => Ok(true),
        Some(Interface::Bridge | Interface::Other) => Err(NetError::NotTap { name: tap.clone() }),
    }
}

/// Whether no interface of this host has the hardware address: a bridge would keep for
/// the host what is sent to it.
///
/// # Errors
/// Which one has it.
pub(in crate::workload) fn hardware_is_free(mac: Mac) -> Result<(), NetError> {
    let failed = |e: nix::Error| system("look for", "addresses of this host")(e.into());
    for interface in nix::ifaddrs::getifaddrs().map_err(failed)? {
        let found = interface.address.as_ref().and_then(|address| address.as_link_addr()?.addr());
        if found == Some(mac) {
            return Err(NetError::HardwareTaken { interface: interface.interface_name, mac });
        }
    }
    Ok(())
}

fn seen(name: &str) -> Result<Option<Interface>, NetError> {
    tap::look(name).map_err(system("look at", name))
}

fn system(what: &'static str, name: &str) -> impl FnOnce(io::Error) -> NetError {
    let name = name.to_owned();
    move |source| NetError::System { what, name, source }
}

/// Opens the tap of an interface, makes it before if need be, and switches it on.
///
/// # Errors
/// Why it can't be had. What was made for it is gone then.
pub fn open(net: &NetConfig) -> Result<OwnedFd, NetError> {
    let NetConfig { tap, bridge, mac } = net;
    let was_there = look(net)?;
    let header = u8::try_from(HEADER_BYTES).unwrap_or(u8::MAX);
    let opened = tap::open(tap, header).map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => NetError::Busy { tap: tap.clone() },
        _ => system("open the tap", tap)(source),
    })?;
    if !was_there {
        let address = Mac::try_from(&mac[..]).map(own_address).unwrap_or_default();
        tap::set_address(tap, address).map_err(system("give an address to", tap))?;
    }
    if !bridge.is_empty() {
        join(bridge, tap)?;
    }
    tap::set_up(tap).map_err(system("switch on", tap))?;
    Ok(opened)
}

/// The address of the host's end: a bridge takes the lowest of its ports', so
/// it is a high one, lest the bridge's own change with each VM.
pub(in crate::workload) fn own_address(guest: Mac) -> Mac {
    let mut mac = guest;
    mac[0] = if guest[0] == 0xfe { 0xfa } else { 0xfe };
    mac
}

fn join(bridge: &str, tap: &str) -> Result<(), NetError> {
    match tap::join(bridge, tap) {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let master = std::fs::read_link(format!("/sys/class/net/{tap}/master"));
            let found = master.ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
            match found.filter(|found| found != bridge) {
                Some(found) => Err(NetError::OtherBridge {
                    tap: tap.to_owned(),
                    bridge: bridge.to_owned(),
                    found,
                }),
                None => Ok(()),
            }
        }
        joined => joined.map_err(system("add to its bridge", tap)),
    }
}

/// Opens the taps of a VM and gives them to its child, which has them from
/// then on as long as it lives.
///
/// # Errors
/// When one can't be had.
pub(super) async fn attach(child: &Child) -> Result<(), WorkloadError> {
    let nets = child.config().nets.clone();
    if nets.is_empty() {
        return Ok(());
    }
    let opened = tokio::task::spawn_blocking(move || {
        let one = |(index, net)| {
            let fd = open(net).map_err(|error| error.on_this_host())?;
            Ok(Backing { device: Device::Net(index), fd })
        };
        (0..).zip(&nets).map(one).collect::<Result<Vec<_>, WorkloadError>>()
    });
    let failed = |e| Err(WorkloadError::caused("opening its taps failed", e));
    let backings = opened.await.unwrap_or_else(failed)?;
    child.give(backings).await.map_err(told("give it its taps"))
}

#[cfg(test)]
mod tests;
