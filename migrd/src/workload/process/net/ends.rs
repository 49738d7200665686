//! The two ends of a network, made, found, joined and cut by calls that wait.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::config::{self, Plan};
use super::error::{NetError, system};
use super::route::{Link, Route, Veth};
use super::{INNER_NAME, frames, inside};
use crate::sys::netns::{self, FrameSocket};
use crate::units::WorkloadId;
use crate::workload::vm::nets::{self, own_address};

/// The kernel switches frames through a moment after both ends are on.
const UNTIL_IT_WORKS: Duration = Duration::from_millis(300);

/// How much smaller packets are inside until it is joined (bytes). A connection that CRIU
/// makes there counts with segments of 536 bytes (RFC 9293, 3.7.1) until the kernel sees
/// another limit than it saw first.
const NARROWER: u32 = 8;
/// The smallest packets of IPv6 (RFC 8200, 5), in bytes.
const SMALLEST: u32 = 1280;

/// The limit inside before it is joined, of one whose outer end has that.
fn narrow(mtu: u32) -> u32 {
    mtu.checked_sub(NARROWER).filter(|less| *less >= SMALLEST).unwrap_or(mtu)
}

/// Both ends of it.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) plan: Plan,
    pub(super) namespace: OwnedFd,
    pub(super) inode: u64,
    /// Of the end in this host's namespace.
    outer: u32,
    /// Of the end in the workload's.
    inner: u32,
}

impl Ends {
    pub(super) fn make(plan: Plan) -> Result<Self, NetError> {
        let name = config::name_of(plan.id);
        let mut host = Route::open().map_err(system("ask about", &name))?;
        let mtu = bridge(&mut host, &plan.bridge)?.mtu;
        address_is_free(plan.address)?;
        nets::hardware_is_free(plan.mac)?;
        let namespace = netns::make().map_err(system("make a namespace for", &name))?;
        let veth = Veth {
            name: &name,
            mac: own_address(plan.mac),
            peer_name: INNER_NAME,
            peer_mac: plan.mac,
            peer_namespace: namespace.as_fd(),
            mtu,
            peer_mtu: narrow(mtu),
        };
        host.add_veth(&veth).map_err(|e| match e.raw_os_error() {
            Some(libc::EEXIST) => NetError::NameTaken { name: name.clone() },
            _ => system("make the interface", &name)(e),
        })?;
        let lost = || NetError::Lost { name: name.clone() };
        let made = host.named(&name).map_err(system("look at", &name))?.ok_or_else(lost)?;
        let mut finish = || {
            let alias = config::alias_of(plan.id);
            host.mark(made.index, alias).map_err(system("mark", &name))?;
            inside::set_up(namespace.as_fd(), made.peer, &plan)?;
            netns::inode(&namespace).map_err(system("look at the namespace of", &name))
        };
        match finish() {
            Ok(inode) => Ok(Self { plan, namespace, inode, outer: made.index, inner: made.peer }),
            Err(error) => {
                if let Err(source) = host.delete(made.index) {
                    tracing::warn!(%name, %source, "an interface could not be deleted");
                }
                Err(error)
            }
        }
    }

    pub(super) fn find(plan: Plan, namespace: OwnedFd) -> Result<Self, NetError> {
        let name = config::name_of(plan.id);
        let lost = || NetError::Lost { name: name.clone() };
        let look = || system("look at the namespace of", &name);
        let inode = netns::inode(&namespace).map_err(look())?;
        let mut host = Route::open().map_err(system("ask about", &name))?;
        let outer = host.named(&name).map_err(system("look at", &name))?.ok_or_else(lost)?;
        let mut there = Route::of(namespace.as_fd()).map_err(look())?;
        let inner = there.numbered(outer.peer).map_err(look())?.ok_or_else(lost)?;
        // Indices count in each namespace anew: only in the right one, and only
        // the right interface, has this one for its other end and its address.
        let own = netns::current().and_then(netns::inode).map_err(look())?;
        let joined = inner.is_veth && inner.peer == outer.index && own != inode;
        if !is_of(&outer, plan.id) || !joined {
            return Err(lost());
        }
        Ok(Self { plan, namespace, inode, outer: outer.index, inner: inner.index })
    }

    pub(super) fn put_in_bridge(&self) -> Result<(), NetError> {
        let name = config::name_of(self.plan.id);
        let mut host = Route::open().map_err(system("ask about", &name))?;
        let bridge = bridge(&mut host, &self.plan.bridge)?;
        host.put_in(self.outer, bridge.index).map_err(system("add to its bridge", &name))
    }

    pub(super) fn join(&self) -> Result<(), NetError> {
        // First into the bridge: outside of one, what it receives would be this
        // host's to answer.
        self.put_in_bridge()?;
        let name = config::name_of(self.plan.id);
        let mut host = Route::open().map_err(system("ask about", &name))?;
        host.switch(self.outer, true).map_err(system("switch on", &name))?;
        self.wait_for_both(&mut host).map_err(system("look at", &name))?;
        self.open_up(&mut host).map_err(system("look into the namespace of", &name))?;
        self.ask_again()
    }

    /// Asks for the neighbours that the kernel inside has asked for in vain: it holds what
    /// CRIU and the workload had to say to them, and would ask in a second.
    pub(super) fn ask_again(&self) -> Result<(), NetError> {
        let name = config::name_of(self.plan.id);
        let asked = Route::of(self.namespace.as_fd()).and_then(|mut there| there.asked(self.inner));
        let asked = asked.map_err(system("look at the neighbours of", &name))?;
        if asked.is_empty() {
            return Ok(());
        }
        let socket = self.frame_socket()?;
        let questions =
            asked.iter().filter_map(|of| frames::question(self.plan.mac, self.plan.address, *of));
        for question in questions {
            socket.send(&question).map_err(system("ask the neighbours of", &name))?;
        }
        Ok(())
    }

    /// Has the kernel inside see the right size of packets.
    fn open_up(&self, host: &mut Route) -> io::Result<()> {
        let mut there = Route::of(self.namespace.as_fd())?;
        let (outer, inner) = (host.numbered(self.outer)?, there.numbered(self.inner)?);
        // What the workload has chosen itself stays.
        if let (Some(outer), Some(inner)) = (outer, inner)
            && inner.mtu == narrow(outer.mtu)
        {
            there.set_mtu(self.inner, outer.mtu)?;
        }
        Ok(())
    }

    /// Until then the kernel drops every frame, and says nothing.
    fn wait_for_both(&self, host: &mut Route) -> io::Result<()> {
        let mut there = Route::of(self.namespace.as_fd())?;
        let end = Instant::now() + UNTIL_IT_WORKS;
        while Instant::now() < end {
            let outer = host.numbered(self.outer)?.is_some_and(|link| link.works);
            let inner = there.numbered(self.inner)?;
            // The workload may have switched its end off, or deleted it.
            let off = inner.as_ref().is_none_or(|link| !link.is_on);
            if off || (outer && inner.is_some_and(|link| link.works)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub(super) fn cut(&self) -> Result<(), NetError> {
        let name = config::name_of(self.plan.id);
        let mut host = Route::open().map_err(system("ask about", &name))?;
        host.switch(self.outer, false).map_err(system("switch off", &name))?;
        host.put_in(self.outer, 0).map_err(system("take out of its bridge", &name))
    }

    pub(super) fn frame_socket(&self) -> Result<FrameSocket, NetError> {
        netns::within(self.namespace.as_fd(), || FrameSocket::open(self.inner))
            .and_then(|opened| opened)
            .map_err(system("send frames from", &config::name_of(self.plan.id)))
    }
}

pub(super) fn bridge(host: &mut Route, name: &str) -> Result<Link, NetError> {
    let found = host.named(name).map_err(system("look at", name))?;
    let none = || nets::NetError::NoBridge { bridge: name.to_owned() };
    let found = found.ok_or_else(none)?;
    if !found.is_bridge {
        return Err(nets::NetError::NotBridge { name: name.to_owned() }.into());
    }
    Ok(found)
}

pub(super) fn address_is_free(address: IpAddr) -> Result<(), NetError> {
    let failed = || system("look for", "addresses of this host");
    for interface in nix::ifaddrs::getifaddrs().map_err(|e| failed()(e.into()))? {
        let Some(found) = interface.address else { continue };
        let v4 = found.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        let v6 = found.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip()));
        if v4.or(v6) == Some(address) {
            return Err(NetError::AddressTaken { interface: interface.interface_name, address });
        }
    }
    Ok(())
}

/// Whether the host's end can have its name: two daemons that share a network
/// namespace can't hold one workload.
pub(super) fn name_is_free(id: WorkloadId) -> Result<(), NetError> {
    let name = config::name_of(id);
    let mut host = Route::open().map_err(system("ask about", &name))?;
    match host.named(&name).map_err(system("look at", &name))? {
        None => Ok(()),
        Some(_) => Err(NetError::NameTaken { name }),
    }
}

/// The name begins with only part of the id, which a peer may choose: another's
/// must not be taken for it.
pub(super) fn is_of(link: &Link, id: WorkloadId) -> bool {
    link.is_veth && config::id_in(&link.alias) == Some(id)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;

    use migr_proto::v1::ProcessNet;

    use super::*;

    fn ip(words: &str) {
        let status = Command::new("ip").args(words.split(' ')).status();
        assert!(status.expect("install iproute2").success(), "ip {words}");
    }

    #[test]
    fn who_was_asked_in_vain_is_asked_again_when_it_is_joined() {
        let host = netns::make().expect("run the tests as root");
        let looked = netns::within(host.as_fd(), || {
            ip("link add br0 type bridge");
            ip("link set br0 up");
            ip("addr add 10.97.0.9/24 dev br0");
            let other = UdpSocket::bind("10.97.0.9:9").unwrap();
            let net = ProcessNet {
                address: "10.97.0.5/24".into(),
                bridge: "br0".into(),
                ..ProcessNet::default()
            };
            let ends = Ends::make(Plan::new(WorkloadId::random(), &net).unwrap()).unwrap();
            let asked = || {
                let mut there = Route::of(ends.namespace.as_fd()).unwrap();
                there.asked(ends.inner).unwrap().len()
            };
            let speak = || {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.send_to(b"is anybody there", "10.97.0.9:9").unwrap();
            };
            netns::within(ends.namespace.as_fd(), speak).unwrap();
            let cut = asked();
            ends.join().unwrap();
            let outer = Route::open().unwrap().numbered(ends.outer).unwrap().unwrap();
            let mut there = Route::of(ends.namespace.as_fd()).unwrap();
            let inner = there.numbered(ends.inner).unwrap().unwrap();
            assert_eq!(inner.mtu, outer.mtu, "the right size once it is joined");
            let mut heard = [0; 16];
            other.recv(&mut heard).expect("what was said before");
            assert_eq!(&heard, b"is anybody there");
            (cut, asked())
        });
        assert_eq!(looked.unwrap(), (1, 0));
    }
}
