//! Taps and bridges of the calling thread's network namespace.

use std::fs::OpenOptions;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Where taps are opened.
pub const DEVICE: &str = "/dev/net/tun";
/// The longest name of an interface, in bytes (`IFNAMSIZ` with its NUL).
pub const NAME_MAX: usize = 15;

/// `SIOCBRADDIF`: adds an interface to a bridge (linux/sockios.h).
const BRIDGE_ADD: libc::c_ulong = 0x89a2;
/// `ETHTOOL_GDRVINFO`, `ETHTOOL_GLINK` (linux/ethtool.h).
const DRIVER_INFO: u32 = 0x3;
const LINK: u32 = 0xa;

/// What kind of interface there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// A tap. `busy`: somebody is behind it.
    Tap {
        /// Somebody has opened it.
        busy: bool,
    },
    /// A bridge.
    Bridge,
    /// Anything else.
    Other,
}

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    rest: [u8; 64],
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    cmd: u32,
    data: u32,
}

/// A request about the interface `name`; all else in it is zero.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq is plain data, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

/// A socket through which interfaces are asked about.
fn control() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Unix, SockType::Datagram, flags, None)?)
}

/// Asks about an interface, or tells it something.
fn interface_ioctl(call: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    let control = control()?;
    // SAFETY: every call that is made here takes an ifreq, and what a pointer
    // in it points to is the caller's and lives longer.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), call, request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What `name` is; `None` when there is no such interface. Changes nothing.
///
/// # Errors
/// What the system says.
pub fn look(name: &str) -> io::Result<Option<Interface>> {
    let mut info: DriverInfo = DriverInfo {
        cmd: DRIVER_INFO,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        bus: [0; 32],
        rest: [0; 64],
    };
    let mut ask = request(name)?;
    ask.ifr_ifru.ifru_data = (&raw mut info).cast();
    match interface_ioctl(libc::SIOCETHTOOL, &mut ask) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
        // It is there, and is of a kind that does not say which.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            return Ok(Some(Interface::Other));
        }
        other => other?,
    }
    Ok(Some(match (text(&info.driver), text(&info.bus)) {
        (b"tun", b"tap") => Interface::Tap { busy: has_link(name)? },
        (b"bridge", _) => Interface::Bridge,
        _ => Interface::Other,
    }))
}

fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A tap has a link while it is open.
fn has_link(name: &str) -> io::Result<bool> {
    let mut value = Value { cmd: LINK, data: 0 };
    let mut ask = request(name)?;
    ask.ifr_ifru.ifru_data = (&raw mut value).cast();
    interface_ioctl(libc::SIOCETHTOOL, &mut ask)?;
    Ok(value.data != 0)
}

/// Opens the tap `name`, which is made if it is not there, and then goes when
/// it is closed. Each frame has a header of `header_bytes` before it (`struct
/// virtio_net_hdr`), and comes whole, with its checksum.
///
/// # Errors
/// What the system says: `EBUSY` when somebody has it open.
pub fn open(name: &str, header_bytes: u8) -> io::Result<OwnedFd> {
    let mut how = OpenOptions::new();
    let tap = how.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
    let mut wanted = request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    wanted.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the call takes an ifreq.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut wanted) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let header = libc::c_int::from(header_bytes);
    // SAFETY: the call takes a pointer to an int.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call takes a number.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap.into())
}

/// Switches an interface on.
///
/// # Errors
/// What the system says.
pub fn set_up(name: &str) -> io::Result<()> {
    let mut ask = request(name)?;
    interface_ioctl(libc::SIOCGIFFLAGS, &mut ask)?;
    // SAFETY: the call that succeeded has filled in the flags.
    let flags = unsafe { ask.ifr_ifru.ifru_flags };
    let up = libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    if flags & up != 0 {
        return Ok(());
    }
    ask.ifr_ifru.ifru_flags = flags | up;
    interface_ioctl(libc::SIOCSIFFLAGS, &mut ask)
}

/// Gives an interface another hardware address.
///
/// # Errors
/// What the system says.
pub fn set_address(name: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut ask = request(name)?;
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(mac) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    ask.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
    interface_ioctl(libc::SIOCSIFHWADDR, &mut ask)
}

/// Makes an interface a port of a bridge.
///
/// # Errors
/// What the system says: `EBUSY` when it is a port already, of whichever.
pub fn join(bridge: &str, name: &str) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(name)?;
    let mut ask = request(bridge)?;
    ask.ifr_ifru.ifru_ifindex = libc::c_int::try_from(index).map_err(io::Error::other)?;
    interface_ioctl(BRIDGE_ADD, &mut ask)
}
