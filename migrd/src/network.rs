//! A network whose members an operator trusts.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// An IP network in CIDR notation (RFC 4632, RFC 4291 section 2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    /// How many of the address's leading bits all members share.
    bits: u8,
}

/// Not a network that can be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Not of the form.
    #[error("{0:?} is not a network: write it as in 10.0.0.0/24 or fd00:1::/64")]
    Malformed(String),
    /// More bits than the address has.
    #[error("{0:?} has more bits after the slash than the address has")]
    TooLong(String),
    /// The bits after the prefix are not zero.
    #[error("{0:?} is an address in a network; the network itself is {1}")]
    NotItself(String, Network),
    /// The whole Internet.
    #[error("{0:?} is everybody: name the network that only trusted hosts are in")]
    Everybody(String),
}

impl Network {
    /// Whether the address is one of this network's. An IPv4 address is the same
    /// when it comes mapped into IPv6 (RFC 4291, section 2.5.5.2).
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (network, width) = whole(self.address);
        let (address, other) = whole(address.to_canonical());
        width == other && (network ^ address).leading_zeros() >= u32::from(self.bits)
    }
}

/// The address's bits from the left, and how many there are.
fn whole(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let malformed = || NetworkError::Malformed(text.to_owned());
        let (address, bits) = text.split_once('/').ok_or_else(malformed)?;
        let address: IpAddr = address.parse().map_err(|_| malformed())?;
        let bits: u8 = bits.parse().map_err(|_| malformed())?;
        let (value, width) = whole(address);
        if bits > width {
            return Err(NetworkError::TooLong(text.to_owned()));
        }
        if bits == 0 {
            return Err(NetworkError::Everybody(text.to_owned()));
        }
        let first = value & (u128::MAX << (128 - u32::from(bits)));
        if first != value {
            let address = match address {
                IpAddr::V4(v4) => {
                    let mask = u32::MAX << (32 - u32::from(bits));
                    IpAddr::V4((v4.to_bits() & mask).into())
                }
                IpAddr::V6(_) => IpAddr::V6(first.into()),
            };
            return Err(NetworkError::NotItself(text.to_owned(), Self { address, bits }));
        }
        Ok(Self { address, bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(network: &str, address: &str) -> bool {
        let network: Network = network.parse().expect("a network");
        network.contains(address.parse().expect("an address"))
    }

    #[test]
    fn a_network_contains_its_members_only() {
        assert!(contains("10.99.0.0/24", "10.99.0.7"));
        assert!(contains("10.99.0.0/24", "::ffff:10.99.0.7"));
        assert!(contains("10.99.0.7/32", "10.99.0.7"));
        assert!(contains("fd00:1::/64", "fd00:1::9"));
        assert!(contains("128.0.0.0/1", "255.255.255.255"));
        for (network, address) in [
            ("10.99.0.0/24", "10.99.1.7"),
            ("10.99.0.7/32", "10.99.0.8"),
            ("fd00:1::/64", "fd00:1:0:1::9"),
            ("10.99.0.0/24", "a63::"),
            ("a63::/16", "10.99.0.1"),
        ] {
            assert!(!contains(network, address), "{network} {address}");
        }
    }

    #[test]
    fn what_is_no_network_is_refused_with_what_to_write() {
        for (text, said) in [
            ("10.99.0.0", "10.0.0.0/24"),
            ("10.99.0/24", "10.0.0.0/24"),
            ("10.99.0.0/-1", "10.0.0.0/24"),
            ("10.99.0.0/33", "more bits"),
            ("fd00::/129", "more bits"),
            ("0.0.0.0/0", "everybody"),
            ("10.99.0.1/24", "10.99.0.0/24"),
            ("fd00:1::1/64", "fd00:1::/64"),
        ] {
            let error = text.parse::<Network>().expect_err(text).to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
