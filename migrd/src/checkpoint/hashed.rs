//! A stream of which a hash is made as it passes.

use std::io::{self, Read, Write};

/// Bytes written to, or read from, another; BLAKE3 over them.
pub(super) struct Hashed<T> {
    through: T,
    hasher: blake3::Hasher,
}

impl<T> Hashed<T> {
    pub(super) fn new(through: T) -> Self {
        Self { through, hasher: blake3::Hasher::new() }
    }

    /// The other, and the hash in hexadecimal.
    pub(super) fn finish(self) -> (T, String) {
        (self.through, self.hasher.finalize().to_hex().to_string())
    }
}

impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.through.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.through.flush()
    }
}

impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.through.read(into)?;
        self.hasher.update(&into[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_and_read_again_has_the_same_hash() {
        let mut out = Hashed::new(Vec::new());
        out.write_all(b"abc").unwrap();
        out.write_all(b"def").unwrap();
        let (bytes, written) = out.finish();
        assert_eq!(written, blake3::hash(b"abcdef").to_hex().as_str());
        let mut from = Hashed::new(&bytes[..]);
        io::copy(&mut from, &mut io::sink()).unwrap();
        assert_eq!(from.finish().1, written);
    }
}
