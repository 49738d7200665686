//! Reads and loads an ELF kernel.
//!
//! linux-loader has a loader too; it writes each segment before it has seen
//! the next and checks neither the area below 1 MiB nor overlaps, so only its
//! structures are used.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::GuestMemoryBackend;

use super::{BootError, Span, copy, file_length, layout};

/// The first four bytes.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// Far more than any kernel has.
const SEGMENTS_MAX: u16 = 128;
/// Far more than the notes of any kernel take, in bytes.
const NOTES_MAX: u64 = 1 << 20;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// An ELF kernel that is in guest memory.
#[derive(Debug)]
pub(super) struct Image {
    /// From its lowest to its highest address.
    pub span: Span,
    /// Entry point of the ELF header.
    pub entry: u64,
    /// Entry point of the PVH note.
    pub pvh_entry: Option<u32>,
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(field) = bytes.get(at..at + N) {
        out.copy_from_slice(field);
    }
    out
}

/// Loads `file` below `ram_end`. Nothing is written before all of its headers
/// were found good.
pub(super) fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &mut File,
    ram_end: u64,
) -> Result<Image, BootError> {
    let length = file_length(file, "kernel")?;
    let (entry, segments) = read_headers(file, length)?;
    let mut loads: Vec<&Segment> =
        segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_bytes > 0).collect();
    loads.sort_by_key(|segment| segment.address);
    let span = check_segments(&loads, ram_end)?;
    let pvh_entry = find_pvh_entry(file, &segments)?;

    let first = pvh_entry.map_or(entry, u64::from);
    let inside = |s: &&Segment| first >= s.address && first - s.address < s.memory_bytes;
    if !loads.iter().any(inside) {
        return Err(BootError::EntryOutsideKernel { entry: first });
    }
    for segment in loads {
        copy(mem, segment.address, file, segment.offset, segment.file_bytes, "kernel")?;
    }
    Ok(Image { span, entry, pvh_entry })
}

fn read_at(
    file: &File,
    offset: u64,
    bytes: usize,
    length: u64,
    what: &'static str,
) -> Result<Vec<u8>, BootError> {
    let end = offset.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    if end > length {
        return Err(BootError::Truncated { what, end, length });
    }
    let mut buffer = vec![0; bytes];
    file.read_exact_at(&mut buffer, offset)
        .map_err(|source| BootError::Read { what: "kernel", source })?;
    Ok(buffer)
}

fn read_headers(file: &File, length: u64) -> Result<(u64, Vec<Segment>), BootError> {
    let header = read_at(file, 0, HEADER_BYTES, length, "the ELF header")?;
    let refuse = |what| Err(BootError::ElfHeader { what });
    if header[4] != 2 {
        return refuse("not 64-bit");
    }
    if header[5] != 1 {
        return refuse("not little-endian");
    }
    if u16::from_le_bytes(le(&header, 16)) != 2 {
        return refuse("not an executable (ET_EXEC)");
    }
    if u16::from_le_bytes(le(&header, 18)) != 62 {
        return refuse("not for x86-64");
    }
    let entry = u64::from_le_bytes(le(&header, 24));
    let table = u64::from_le_bytes(le(&header, 32));
    if usize::from(u16::from_le_bytes(le(&header, 54))) != PROGRAM_HEADER_BYTES {
        return refuse("program headers of an unknown size");
    }
    let count = u16::from_le_bytes(le(&header, 56));
    if count > SEGMENTS_MAX {
        return refuse("too many program headers");
    }
    let bytes = usize::from(count) * PROGRAM_HEADER_BYTES;
    let table = read_at(file, table, bytes, length, "the table of program headers")?;
    let segments: Vec<_> = table.chunks_exact(PROGRAM_HEADER_BYTES).map(read_segment).collect();
    for segment in &segments {
        check_in_file(segment, length)?;
    }
    Ok((entry, segments))
}

fn read_segment(bytes: &[u8]) -> Segment {
    Segment {
        kind: u32::from_le_bytes(le(bytes, 0)),
        offset: u64::from_le_bytes(le(bytes, 8)),
        address: u64::from_le_bytes(le(bytes, 24)),
        file_bytes: u64::from_le_bytes(le(bytes, 32)),
        memory_bytes: u64::from_le_bytes(le(bytes, 40)),
    }
}

fn check_in_file(segment: &Segment, length: u64) -> Result<(), BootError> {
    if segment.kind != PT_LOAD && segment.kind != PT_NOTE {
        return Ok(());
    }
    let end = segment.offset.saturating_add(segment.file_bytes);
    if end > length {
        return Err(BootError::Truncated { what: "a segment", end, length });
    }
    if segment.kind == PT_LOAD && segment.file_bytes > segment.memory_bytes {
        return Err(BootError::ElfHeader { what: "a segment larger in the file than in memory" });
    }
    Ok(())
}

/// Checks the segments, which are sorted by address, and says what they span.
fn check_segments(loads: &[&Segment], ram_end: u64) -> Result<Span, BootError> {
    let first = loads.first().ok_or(BootError::NoSegments)?;
    let mut span = Span { start: first.address, end: first.address };
    if span.start < layout::KERNEL_START {
        return Err(BootError::KernelTooLow { start: span.start });
    }
    for segment in loads {
        if segment.address < span.end {
            return Err(BootError::SegmentsOverlap { at: segment.address });
        }
        let start = segment.address;
        let end = start.saturating_add(segment.memory_bytes);
        if end > ram_end {
            return Err(BootError::KernelOutsideMemory { start, end, ram_end });
        }
        span.end = end;
    }
    Ok(span)
}

fn find_pvh_entry(file: &File, segments: &[Segment]) -> Result<Option<u32>, BootError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        if segment.file_bytes > NOTES_MAX {
            return Err(BootError::ElfHeader { what: "a note segment of over 1 MiB" });
        }
        let mut notes = vec![0; usize::try_from(segment.file_bytes).unwrap_or_default()];
        file.read_exact_at(&mut notes, segment.offset)
            .map_err(|source| BootError::Read { what: "kernel", source })?;
        if let Some(entry) = pvh_entry_in(&notes)? {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Walks the notes of one segment: three 32-bit words (name size, descriptor
/// size, type), then the name and the descriptor, each padded to 4 bytes.
fn pvh_entry_in(mut notes: &[u8]) -> Result<Option<u32>, BootError> {
    while notes.len() >= 12 {
        let size = |at| usize::try_from(u32::from_le_bytes(le(notes, at))).unwrap_or(usize::MAX);
        let (name_bytes, desc_bytes) = (size(0), size(4));
        let kind = u32::from_le_bytes(le(notes, 8));
        let padded = |bytes: usize| bytes.checked_next_multiple_of(4);
        let (Some(name_padded), Some(desc_padded)) = (padded(name_bytes), padded(desc_bytes))
        else {
            return Ok(None);
        };
        let body = &notes[12..];
        let Some((name, rest)) = body.split_at_checked(name_padded.min(body.len())) else {
            return Ok(None);
        };
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // Linux writes 8 bytes where assembler pads, others 4; both are
            // little-endian and the entry is a 32-bit address.
            if desc_bytes < 4 || rest.len() < 4 {
                return Err(BootError::ElfHeader { what: "a PVH note without an address" });
            }
            return Ok(Some(u32::from_le_bytes(le(rest, 0))));
        }
        notes = rest.get(desc_padded..).unwrap_or_default();
    }
    Ok(None)
}
