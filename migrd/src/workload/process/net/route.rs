//! What the kernel is asked about interfaces, addresses and routes (rtnetlink(7)).
//!
//! Only single interfaces are asked for: a list of all would fail on the first
//! of some strange kind. Of neighbours, those of a strange kind are left out.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::sys::netns;
use crate::units::Mac;

/// What is known of an interface.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) is_bridge: bool,
    pub(super) is_veth: bool,
    /// Of a veth: the index of its other end, in the namespace where that is.
    pub(super) peer: u32,
    pub(super) alias: String,
    pub(super) mtu: u32,
    /// It was switched on.
    pub(super) is_on: bool,
    /// Frames go through.
    pub(super) works: bool,
}

/// A veth pair to make.
pub(super) struct Veth<'a> {
    /// Of the end that stays in this namespace.
    pub(super) name: &'a str,
    pub(super) mac: Mac,
    /// Of the other end.
    pub(super) peer_name: &'a str,
    pub(super) peer_mac: Mac,
    pub(super) peer_namespace: BorrowedFd<'a>,
    /// In bytes.
    pub(super) mtu: u32,
    /// Of the other end.
    pub(super) peer_mtu: u32,
}

/// A way to ask the kernel about one namespace.
pub(super) struct Route {
    socket: Socket,
    sequence: u32,
}

impl Route {
    /// About the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// About another one.
    pub(super) fn of(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        netns::within(namespace, Self::open)?
    }

    /// The interface of that name, if there is one.
    pub(super) fn named(&mut self, name: &str) -> io::Result<Option<Link>> {
        self.link(0, vec![LinkAttribute::IfName(name.to_owned())])
    }

    /// The interface of that index, if there is one.
    pub(super) fn numbered(&mut self, index: u32) -> io::Result<Option<Link>> {
        self.link(index, Vec::new())
    }

    fn link(&mut self, index: u32, mut by: Vec<LinkAttribute>) -> io::Result<Option<Link>> {
        by.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let about = link_message(index, by);
        match self.ask(RouteNetlinkMessage::GetLink(about), 0) {
            Ok(Some(RouteNetlinkMessage::NewLink(found))) => Ok(Some(read_link(&found))),
            Ok(_) => Err(io::Error::other("the kernel answered with something else")),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes a veth pair. Both ends are off.
    pub(super) fn add_veth(&mut self, veth: &Veth<'_>) -> io::Result<()> {
        let end = |name: &str, mac: Mac, mtu| {
            vec![
                LinkAttribute::IfName(name.to_owned()),
                LinkAttribute::Address(mac.to_vec()),
                LinkAttribute::Mtu(mtu),
            ]
        };
        let mut inner = end(veth.peer_name, veth.peer_mac, veth.peer_mtu);
        inner.push(LinkAttribute::NetNsFd(veth.peer_namespace.as_raw_fd()));
        let mut outer = end(veth.name, veth.mac, veth.mtu);
        outer.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(link_message(0, inner)))),
        ]));
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.tell(RouteNetlinkMessage::NewLink(link_message(0, outer)), flags)
    }

    /// Gives an interface an alias, and no IPv6 address of its own.
    pub(super) fn mark(&mut self, index: u32, alias: String) -> io::Result<()> {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let quiet = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]);
        self.set(link_message(index, vec![LinkAttribute::IfAlias(alias), quiet]))
    }

    /// Makes an interface a port of a bridge; of none, if that is 0.
    pub(super) fn put_in(&mut self, index: u32, bridge: u32) -> io::Result<()> {
        self.set(link_message(index, vec![LinkAttribute::Controller(bridge)]))
    }

    /// Switches an interface on or off.
    pub(super) fn switch(&mut self, index: u32, on: bool) -> io::Result<()> {
        let mut message = link_message(index, Vec::new());
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if on { LinkFlags::Up } else { LinkFlags::empty() };
        self.set(message)
    }

    /// Sets how large packets may be, in bytes.
    pub(super) fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        self.set(link_message(index, vec![LinkAttribute::Mtu(mtu)]))
    }

    fn set(&mut self, message: LinkMessage) -> io::Result<()> {
        self.tell(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Deletes an interface; not an error when it is gone.
    pub(super) fn delete(&mut self, index: u32) -> io::Result<()> {
        match self.tell(RouteNetlinkMessage::DelLink(link_message(index, Vec::new())), 0) {
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Gives an interface an address, which can be used at once.
    pub(super) fn add_address(
        &mut self,
        index: u32,
        address: IpAddr,
        prefix: u8,
        broadcast: Option<std::net::Ipv4Addr>,
    ) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix;
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address));
        message.attributes.push(AddressAttribute::Address(address));
        message.attributes.extend(broadcast.map(AddressAttribute::Broadcast));
        if address.is_ipv6() {
            // Its old host may still have it when it is asked for here.
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.tell(RouteNetlinkMessage::NewAddress(message), flags)
    }

    /// Sends what goes nowhere else to `gateway`, through an interface.
    pub(super) fn add_default(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(gateway);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        message.attributes.push(RouteAttribute::Oif(index));
        self.tell(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// The neighbours at an interface that are being asked for their hardware address. The
    /// kernel asks again when a second is over (RFC 1122, 2.3.2.1; RFC 4861, 7.2.2), and
    /// keeps what is to be sent to them.
    pub(super) fn asked(&mut self, index: u32) -> io::Result<Vec<IpAddr>> {
        let mut all = self.neighbours(AddressFamily::Inet)?;
        all.extend(self.neighbours(AddressFamily::Inet6)?);
        let here = all.into_iter().filter(|found| found.header.ifindex == index);
        let asked = here.filter(|found| found.header.state == NeighbourState::Incomplete);
        Ok(asked.flat_map(|found| found.attributes).filter_map(address_in).collect())
    }

    fn neighbours(&mut self, family: AddressFamily) -> io::Result<Vec<NeighbourMessage>> {
        let mut about = NeighbourMessage::default();
        about.header.family = family;
        self.send(RouteNetlinkMessage::GetNeighbour(about), NLM_F_DUMP)?;
        let mut all = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while let Ok(next) = NetlinkBuffer::new_checked(rest) {
                let length = usize::try_from(next.length()).unwrap_or(rest.len());
                let message = rest.get(..length).unwrap_or_default();
                match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
                    Ok(read) if read.header.sequence_number != self.sequence => {}
                    Ok(read) => match read.payload {
                        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(found)) => {
                            all.push(found);
                        }
                        NetlinkPayload::Done(_) => return Ok(all),
                        NetlinkPayload::Error(error) => return Err(error.to_io()),
                        _ => {}
                    },
                    Err(error) => tracing::debug!(%error, "a neighbour of a strange kind"),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    fn tell(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, NLM_F_ACK | flags).map(|_| ())
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Sends one request; returns the kernel's one answer, or `None` for a yes.
    fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        self.send(message, flags)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes);
            let (header, payload) = answer.map_err(io::Error::other)?.into_parts();
            if header.sequence_number != self.sequence {
                continue;
            }
            return match payload {
                NetlinkPayload::InnerMessage(answer) => Ok(Some(answer)),
                NetlinkPayload::Error(error) => match error.code {
                    None => Ok(None),
                    Some(code) => Err(io::Error::from_raw_os_error(code.get().saturating_abs())),
                },
                _ => Err(io::Error::other("the kernel gave no answer")),
            };
        }
    }
}

fn address_in(attribute: NeighbourAttribute) -> Option<IpAddr> {
    match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(address.into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(address.into()),
        _ => None,
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn link_message(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

fn read_link(found: &LinkMessage) -> Link {
    let is_on = found.header.flags.contains(LinkFlags::Up);
    let mut link = Link {
        index: found.header.index,
        is_bridge: false,
        is_veth: false,
        peer: 0,
        alias: String::new(),
        mtu: 0,
        is_on,
        works: false,
    };
    for attribute in &found.attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                link.is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
                link.is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            LinkAttribute::Link(peer) => link.peer = *peer,
            LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::OperState(state) => link.works = is_on && *state == State::Up,
            _ => {}
        }
    }
    link
}
