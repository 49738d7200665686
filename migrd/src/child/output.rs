//! What a child's guest or processes print, written down in the serial log.

use std::fs::File;
use std::io::{self, Write};

use super::console::{Log, Piece};
use crate::serial_log::{self, Cursor, Reader, Writer};
use crate::units::{PAGE_BYTES, PAGE_SIZE};

/// The serial log's file and the bell beside it.
pub struct SerialLog {
    /// Two of the same, until they are used.
    files: Option<(File, File)>,
    bell: File,
    /// Opened at the first output, because until the guest runs here the
    /// daemon may still be putting in place what it printed elsewhere.
    writer: Option<Writer>,
    /// When the line began that an earlier host left unfinished in the log.
    unfinished_ns: Option<u64>,
    /// Bytes that came though the log could not be opened.
    lost: u64,
}

impl SerialLog {
    /// Over the log's file and the bell that is rung after each write.
    ///
    /// # Errors
    /// When there is no room for descriptors.
    pub fn new(log: &File, bell: &File) -> io::Result<Self> {
        let files = Some((log.try_clone()?, log.try_clone()?));
        let bell = bell.try_clone()?;
        Ok(Self { files, bell, writer: None, unfinished_ns: None, lost: 0 })
    }

    fn open(&mut self) -> io::Result<()> {
        let Some((read, write)) = self.files.take() else { return Ok(()) };
        self.unfinished_ns = unfinished_line(read)?;
        self.writer = Some(Writer::open(write)?);
        Ok(())
    }
}

/// When the log's last line began, if it has not ended.
fn unfinished_line(log: File) -> io::Result<Option<u64>> {
    let mut reader = Reader::open(log)?;
    let Cursor(end) = reader.end()?;
    let (entries, _) = reader.read_from(Cursor(end - end % PAGE_SIZE), PAGE_BYTES)?;
    Ok(entries.last().filter(|e| !e.data.ends_with(b"\n")).map(|e| e.line_unix_ns))
}

impl Log for SerialLog {
    fn write(&mut self, pieces: &[Piece]) {
        if let Err(e) = self.open() {
            eprintln!("cannot read the serial log, so nothing is added to it: {e}");
        }
        let mut pieces: Vec<_> = pieces.iter().map(as_logged).collect();
        if let (Some(line_unix_ns), Some(first)) = (self.unfinished_ns.take(), pieces.first_mut()) {
            *first = serial_log::Piece { line_unix_ns, starts_line: false, ..*first };
        }
        match &mut self.writer {
            Some(writer) => writer.append(&pieces),
            None => self.lost += pieces.iter().map(|p| p.bytes.len() as u64).sum::<u64>(),
        }
        // A counter that is full has been rung often enough.
        let _ = self.bell.write(&1_u64.to_ne_bytes());
    }

    fn lost(&self) -> u64 {
        self.lost + self.writer.as_ref().map_or(0, Writer::lost)
    }
}

fn as_logged(piece: &Piece) -> serial_log::Piece<'_> {
    let Piece { line_unix_ns, starts_line, bytes } = piece;
    serial_log::Piece { bytes, line_unix_ns: *line_unix_ns, starts_line: *starts_line }
}
