//! Sizes, durations and addresses as people write and read them.

use std::time::Duration;

/// An argument that is not what it should be; says what would be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Malformed {
    #[error("{0:?} is not a size: give bytes or a number with K, M, G or T, as in 512M or 1GiB")]
    Size(String),
    #[error("{0:?} is more bytes than 64 bits can count")]
    SizeTooLarge(String),
    #[error("the size must be more than zero")]
    SizeZero,
    #[error("{0:?} is not a duration: give a number with a unit, as in 50ms, 30s or 5m")]
    Duration(String),
    #[error("the duration must be more than zero")]
    DurationZero,
    #[error("{0:?} is not ADDR:PORT, as in 127.0.0.1:7070, [::1]:7070 or hostb:7070")]
    Address(String),
    #[error("{0:?} is not a hardware address: give six bytes, as in 02:00:00:00:00:07")]
    Mac(String),
}

/// Reads a size in bytes; K, M, G and T are powers of 1024, with or without
/// `iB` or `B` after them.
pub fn parse_size(text: &str) -> Result<u64, Malformed> {
    let malformed = || Malformed::Size(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    if number.is_empty() {
        return Err(malformed());
    }
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "ki" | "kib" => 10,
        "m" | "mb" | "mi" | "mib" => 20,
        "g" | "gb" | "gi" | "gib" => 30,
        "t" | "tb" | "ti" | "tib" => 40,
        _ => return Err(malformed()),
    };
    let too_large = || Malformed::SizeTooLarge(text.to_owned());
    let number: u64 = number.parse().map_err(|_| too_large())?;
    match number.checked_mul(1 << shift) {
        None => Err(too_large()),
        Some(0) => Err(Malformed::SizeZero),
        Some(bytes) => Ok(bytes),
    }
}

/// Reads a duration longer than zero, such as `50ms`.
pub fn parse_duration(text: &str) -> Result<Duration, Malformed> {
    let duration =
        humantime::parse_duration(text).map_err(|_| Malformed::Duration(text.to_owned()))?;
    if duration.is_zero() { Err(Malformed::DurationZero) } else { Ok(duration) }
}

/// Checks that an address has a host and a port; what it names is found out
/// when it is connected to.
pub fn parse_address(text: &str) -> Result<String, Malformed> {
    let malformed = || Malformed::Address(text.to_owned());
    let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
    let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let name = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || ".-_:%".contains(c));
    if name.is_empty() || !plain || (name.contains(':') && !bracketed) {
        return Err(malformed());
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(text.to_owned()),
        _ => Err(malformed()),
    }
}

/// Reads a hardware address: six bytes in hexadecimal with colons between.
pub fn parse_mac(text: &str) -> Result<[u8; 6], Malformed> {
    let malformed = || Malformed::Mac(text.to_owned());
    let byte = |part: &str| {
        let digits = part.len() == 2 && part.chars().all(|c| c.is_ascii_hexdigit());
        u8::from_str_radix(part, 16).ok().filter(|_| digits)
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(malformed)
}

/// A hardware address as [`parse_mac`] reads it.
pub fn show_mac(mac: &[u8]) -> String {
    let bytes: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// A size in binary units with one decimal, such as `1.5 GiB`.
pub fn show_bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Milliseconds with the digits that mean something at their size.
pub fn show_ms(ms: f64) -> String {
    if !ms.is_finite() {
        "unknown".to_owned()
    } else if ms < 100.0 {
        format!("{ms:.1} ms")
    } else if ms < 10_000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.1} s", ms / 1000.0)
    }
}

/// Text that came over the network, fit for a terminal: control characters,
/// which could move the cursor or set the title, are replaced.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_binary_whatever_their_suffix() {
        for text in ["1G", "1g", "1GB", "1GiB", "1024M", "1024MiB", "1048576K", "1073741824"] {
            assert_eq!(parse_size(text), Ok(1 << 30), "{text}");
        }
        assert_eq!(parse_size("2T"), Ok(2 << 40));
    }

    #[test]
    fn sizes_that_mean_nothing_are_refused() {
        for text in ["", "G", "1.5G", "-1", "1 G", "1X", "0x10", "1GG"] {
            assert_eq!(parse_size(text), Err(Malformed::Size(text.to_owned())));
        }
        for text in ["18446744073709551616", "16777216T"] {
            assert_eq!(parse_size(text), Err(Malformed::SizeTooLarge(text.to_owned())));
        }
        assert_eq!(parse_size("0M"), Err(Malformed::SizeZero));
    }

    #[test]
    fn addresses_need_a_host_and_a_port() {
        for text in ["127.0.0.1:7070", "[::1]:7070", "host-b.example:1"] {
            assert_eq!(parse_address(text), Ok(text.to_owned()));
        }
        for text in ["", "hostb", ":7070", "hostb:", "hostb:0", "hostb:65536", "::1:70", "a/b:1"] {
            assert_eq!(parse_address(text), Err(Malformed::Address(text.to_owned())));
        }
    }

    #[test]
    fn hardware_addresses_have_six_bytes() {
        let mac = [2, 0, 0xff, 0x0a, 0xb0, 7];
        assert_eq!(parse_mac("02:00:fF:0a:B0:07"), Ok(mac));
        assert_eq!(parse_mac(&show_mac(&mac)), Ok(mac));
        for text in [
            "",
            "02",
            "2:0:0:0:0:1",
            "02:00:00:00:00:07:08",
            "02-00-00-00-00-07",
            "+2:00:00:00:00:07",
        ] {
            assert_eq!(parse_mac(text), Err(Malformed::Mac(text.to_owned())));
        }
    }

    #[test]
    fn durations_need_a_unit_and_a_length() {
        assert_eq!(parse_duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_duration("0ms"), Err(Malformed::DurationZero));
        assert_eq!(parse_duration("50"), Err(Malformed::Duration("50".to_owned())));
    }

    #[test]
    fn terminal_escapes_do_not_survive() {
        assert_eq!(plain("a\x1b[2Jb\r\n"), "a\u{fffd}[2Jb\u{fffd}\u{fffd}");
    }

    proptest! {
        #[test]
        fn reading_a_size_never_panics(text in "\\PC*") {
            let _ = parse_size(&text);
            let _ = parse_address(&text);
        }
    }
}
