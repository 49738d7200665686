//! Which options are carried, and how one is read and set.
//!
//! They are named by the numbers of Linux (`linux/tcp.h`, `asm-generic/socket.h`,
//! `linux/in.h`, `linux/in6.h`), which are the same on all processors that migr runs on.

use std::io;
use std::os::fd::AsFd;

use libc::{IPPROTO_IP as IP, IPPROTO_IPV6 as IPV6, IPPROTO_TCP as TCP, SOL_SOCKET as SOCKET};

use crate::sys::sockets::{option, set_option};

/// The longest value (bytes): a name, without the NUL at its end (`TCP_CA_NAME_MAX`).
pub(super) const VALUE_BYTES: usize = 15;
/// The state of a socket that listens (`net/tcp_states.h`), as `tcp_info` has it.
const LISTEN: u8 = 10;
/// The two bits of a traffic class that are the kernel's (RFC 3168, 5).
const ECN: u32 = 3;

/// What the value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An `int`.
    Number,
    /// An `int`, whose bits for ECN are the kernel's.
    Class,
    /// An `unsigned long`.
    Long,
    /// Text: letters, digits, `-` and `_`.
    Name,
}

/// Which sockets have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    Every,
    /// Those that listen; their connections inherit it. Of others it can't be set, or reads
    /// as something else.
    Listening,
    /// Those of IPv6.
    Ipv6,
}

/// An option.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) level: i32,
    pub(super) number: i32,
    /// As programs call it.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) of: Of,
}

const fn known(level: i32, number: i32, name: &'static str, kind: Kind, of: Of) -> Known {
    Known { level, number, name, kind, of }
}

/// Set after a restore by CRIU, whatever it was: it is carried with every value.
pub(super) const REUSEPORT: usize = 0;

/// All that are carried, in the order in which they are set.
#[rustfmt::skip]
pub(super) const ALL: &[Known] = &[
    known(SOCKET, libc::SO_REUSEPORT, "SO_REUSEPORT", Kind::Number, Of::Every),
    known(SOCKET, libc::SO_MAX_PACING_RATE, "SO_MAX_PACING_RATE", Kind::Long, Of::Every),
    known(SOCKET, libc::SO_ZEROCOPY, "SO_ZEROCOPY", Kind::Number, Of::Every),
    known(SOCKET, libc::SO_TIMESTAMP, "SO_TIMESTAMP", Kind::Number, Of::Every),
    known(SOCKET, libc::SO_TIMESTAMPNS, "SO_TIMESTAMPNS", Kind::Number, Of::Every),
    known(SOCKET, libc::SO_BUSY_POLL, "SO_BUSY_POLL", Kind::Number, Of::Every),
    known(TCP, libc::TCP_CONGESTION, "TCP_CONGESTION", Kind::Name, Of::Every),
    known(TCP, libc::TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT", Kind::Number, Of::Every),
    known(TCP, libc::TCP_NOTSENT_LOWAT, "TCP_NOTSENT_LOWAT", Kind::Number, Of::Every),
    known(TCP, libc::TCP_SYNCNT, "TCP_SYNCNT", Kind::Number, Of::Every),
    known(TCP, libc::TCP_LINGER2, "TCP_LINGER2", Kind::Number, Of::Every),
    known(TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, "TCP_THIN_LINEAR_TIMEOUTS", Kind::Number, Of::Every),
    known(TCP, libc::TCP_INQ, "TCP_INQ", Kind::Number, Of::Every),
    known(TCP, 44, "TCP_RTO_MAX_MS", Kind::Number, Of::Every),
    known(TCP, 45, "TCP_RTO_MIN_US", Kind::Number, Of::Every),
    known(TCP, 46, "TCP_DELACK_MAX_US", Kind::Number, Of::Every),
    known(TCP, libc::TCP_MAXSEG, "TCP_MAXSEG", Kind::Number, Of::Listening),
    known(TCP, libc::TCP_WINDOW_CLAMP, "TCP_WINDOW_CLAMP", Kind::Number, Of::Listening),
    known(TCP, libc::TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT", Kind::Number, Of::Listening),
    known(TCP, libc::TCP_FASTOPEN, "TCP_FASTOPEN", Kind::Number, Of::Listening),
    known(TCP, libc::TCP_FASTOPEN_NO_COOKIE, "TCP_FASTOPEN_NO_COOKIE", Kind::Number, Of::Listening),
    known(TCP, libc::TCP_SAVE_SYN, "TCP_SAVE_SYN", Kind::Number, Of::Listening),
    known(IP, libc::IP_MTU_DISCOVER, "IP_MTU_DISCOVER", Kind::Number, Of::Every),
    known(IP, libc::IP_MINTTL, "IP_MINTTL", Kind::Number, Of::Every),
    known(IP, libc::IP_RECVERR, "IP_RECVERR", Kind::Number, Of::Every),
    // CRIU carries these two of sockets of IPv4 only.
    known(IP, libc::IP_TOS, "IP_TOS", Kind::Class, Of::Ipv6),
    known(IP, libc::IP_TTL, "IP_TTL", Kind::Number, Of::Ipv6),
    known(IPV6, libc::IPV6_TCLASS, "IPV6_TCLASS", Kind::Class, Of::Ipv6),
    known(IPV6, libc::IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS", Kind::Number, Of::Ipv6),
    known(IPV6, libc::IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER", Kind::Number, Of::Ipv6),
    known(IPV6, libc::IPV6_MINHOPCOUNT, "IPV6_MINHOPCOUNT", Kind::Number, Of::Ipv6),
    known(IPV6, libc::IPV6_RECVERR, "IPV6_RECVERR", Kind::Number, Of::Ipv6),
];

/// What kind of TCP socket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) listens: bool,
    /// `AF_INET` or `AF_INET6`.
    pub(super) family: i32,
}

impl Shape {
    /// That of a TCP socket; none of others.
    pub(super) fn of(socket: impl AsFd) -> Option<Self> {
        let mut state = [0];
        // Asked for one byte, the kernel gives the state.
        option(&socket, TCP, libc::TCP_INFO, &mut state).ok()?;
        let mut family = [0; 4];
        option(&socket, SOCKET, libc::SO_DOMAIN, &mut family).ok()?;
        Some(Self { listens: state == [LISTEN], family: i32::from_ne_bytes(family) })
    }

    fn has(self, of: Of) -> bool {
        match of {
            Of::Every => true,
            Of::Listening => self.listens,
            Of::Ipv6 => self.family == libc::AF_INET6,
        }
    }
}

impl Known {
    /// The one of these numbers.
    pub(super) fn find(level: i32, number: i32) -> Option<&'static Self> {
        ALL.iter().find(|known| known.level == level && known.number == number)
    }

    /// Whether it can have that value, as far as its form goes; the rest the kernel says.
    pub(super) fn takes(&self, value: &[u8]) -> bool {
        let plain = |c: &u8| c.is_ascii_alphanumeric() || b"-_".contains(c);
        match self.kind {
            Kind::Number | Kind::Class => value.len() == size_of::<libc::c_int>(),
            Kind::Long => value.len() == size_of::<libc::c_ulong>(),
            Kind::Name => (1..=VALUE_BYTES).contains(&value.len()) && value.iter().all(plain),
        }
    }

    /// The value that a socket of that shape has; none if it can't have this option, or the
    /// kernel does not know it.
    pub(super) fn read(&self, socket: impl AsFd, shape: Shape) -> Option<Vec<u8>> {
        if !shape.has(self.of) {
            return None;
        }
        let mut value = vec![
            0;
            match self.kind {
                Kind::Number | Kind::Class => size_of::<libc::c_int>(),
                Kind::Long => size_of::<libc::c_ulong>(),
                Kind::Name => VALUE_BYTES + 1,
            }
        ];
        let length = option(socket, self.level, self.number, &mut value).ok()?;
        value.truncate(length);
        match self.kind {
            Kind::Name => value.truncate(value.iter().position(|c| *c == 0).unwrap_or(length)),
            Kind::Class => value = without_ecn(&value)?,
            Kind::Number | Kind::Long => {}
        }
        self.takes(&value).then_some(value)
    }

    /// Whether the kernel sets SO_PRIORITY with it (ip(7)).
    pub(super) fn changes_priority(&self) -> bool {
        (self.level, self.number) == (IP, libc::IP_TOS)
    }

    /// Gives a socket the value.
    ///
    /// # Errors
    /// What setsockopt(2) says; ENOPROTOOPT when it is no TCP socket.
    pub(super) fn set(&self, socket: impl AsFd, value: &[u8]) -> io::Result<()> {
        set_option(socket, self.level, self.number, value)
    }

    /// `TCP_SYNCNT=3`, of a value that it [takes](Self::takes).
    pub(super) fn display(&self, value: &[u8]) -> String {
        let text = match (self.kind, value) {
            (Kind::Name, name) => String::from_utf8_lossy(name).into_owned(),
            (_, [a, b, c, d]) => i32::from_ne_bytes([*a, *b, *c, *d]).to_string(),
            (_, other) => match other.try_into() {
                Ok(long) => u64::from_ne_bytes(long).to_string(),
                Err(_) => format!("{other:?}"),
            },
        };
        format!("{}={text}", self.name)
    }
}

fn without_ecn(value: &[u8]) -> Option<Vec<u8>> {
    let class = u32::from_ne_bytes(value.try_into().ok()?);
    Some((class & !ECN).to_ne_bytes().to_vec())
}
