//! Archives as the kernel reads an initramfs: cpio, "newc"
//! (Documentation/driver-api/early-userspace/buffer-format.rst of Linux).

use std::io::{self, Write};

/// What a name in the archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    Program,
    File,
}

impl Kind {
    /// File type and permissions, as `st_mode` has them.
    fn mode(self) -> u32 {
        match self {
            Self::Directory => 0o040_755,
            Self::Program => 0o100_755,
            Self::File => 0o100_644,
        }
    }
}

/// An archive that is being written.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty one.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// Adds a directory; those above it must be there.
    ///
    /// # Errors
    /// Those of writing.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, Kind::Directory, &[])
    }

    /// Adds a file that may be executed.
    ///
    /// # Errors
    /// Those of writing.
    pub fn program(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.entry(name, Kind::Program, content)
    }

    /// Adds a file.
    ///
    /// # Errors
    /// Those of writing.
    pub fn file(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.entry(name, Kind::File, content)
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(mut self) -> io::Result<W> {
        self.header("TRAILER!!!", 0, 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, kind: Kind, content: &[u8]) -> io::Result<()> {
        self.header(name, kind.mode(), content.len())?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn header(&mut self, name: &str, mode: u32, size: usize) -> io::Result<()> {
        let size = u32::try_from(size).map_err(io::Error::other)?;
        self.inode += 1;
        let inode = self.inode;
        // Magic, then thirteen numbers: inode, mode, uid, gid, links, mtime,
        // size, two of the device, two of the device it stands for, the length
        // of the name with its zero, no checksum.
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}\
             {0:08x}{0:08x}{0:08x}{0:08x}{2:08x}{0:08x}",
            0,
            1,
            name.len() + 1,
        );
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(header.len() + name.len() + 1)
    }

    /// Headers and contents begin at multiples of four bytes.
    fn pad(&mut self, length: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..length.next_multiple_of(4) - length])
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn busybox_unpacks_what_was_packed() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("a").expect("written");
        archive.program("a/run", b"#!/bin/sh\n").expect("written");
        archive.file("a/odd", b"12345").expect("written");
        let archive = archive.finish().expect("written");

        let directory = tempfile::tempdir().expect("a directory");
        let mut cpio = Command::new("cpio")
            .args(["-i", "--quiet"])
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio");
        cpio.stdin.take().expect("a pipe").write_all(&archive).expect("fed");
        assert!(cpio.wait().expect("an end").success());
        let read = |name: &str| std::fs::read(directory.path().join(name)).expect("a file");
        assert_eq!(read("a/run"), b"#!/bin/sh\n");
        assert_eq!(read("a/odd"), b"12345");
    }
}
