//! Memory that is filled and given back, to see that a migration does not carry what the guest
//! has freed.

use std::hint::black_box;

use crate::pattern::Numbers;

/// Bytes that are taken at a time. Far above the size from which the C library maps memory
/// for each allocation alone, so that freeing gives it back to the kernel at once.
const CHUNK_BYTES: usize = 64 << 20;

/// Memory that is in use, with data that does not compress.
#[derive(Debug)]
pub struct Filled(Vec<Vec<u8>>);

impl Filled {
    /// Takes `bytes` of memory and writes all of it.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let mut numbers = Numbers::of(crate::pattern::Stream::Record, 0);
        let mut chunks = Vec::new();
        let mut left = bytes;
        while left > 0 {
            let mut chunk = vec![0; left.min(CHUNK_BYTES)];
            numbers.fill(&mut chunk);
            left -= chunk.len();
            chunks.push(black_box(chunk));
        }
        Self(chunks)
    }

    /// Bytes in use.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }
}

/// A size such as `512M`: a number with K, M or G, or bytes.
///
/// # Errors
/// When it is no such size, or larger than an address space.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(format!("{text} is no size: give a number and K, M or G")),
    };
    let number: usize =
        number.parse().map_err(|_| format!("{text} is no size: it needs a number"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than can be addressed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_asked_for_is_filled() {
        let filled = Filled::new(CHUNK_BYTES + 5000);
        assert_eq!(filled.bytes(), CHUNK_BYTES + 5000);
        let tail = filled.0.last().unwrap();
        assert_eq!(tail.len(), 5000);
        assert!(tail.chunks(16).all(|bytes| bytes.iter().any(|byte| *byte != 0)));
    }

    #[test]
    fn sizes_have_units_and_bad_ones_are_refused() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("3K"), Ok(3 << 10));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        for bad in ["", "M", "1T", "1MM", "-1", "99999999999999999999", "18446744073709551615G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
