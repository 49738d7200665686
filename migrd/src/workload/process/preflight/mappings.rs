//! What a tree's processes have mapped.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::procfs;
use super::report::Report;
use super::tree::{Process, Tree};

/// A mapping that is of something with a name; one for all mappings of a
/// process of the same thing in the same way.
#[derive(Clone, Debug)]
pub(super) struct Mapping<'a> {
    pub(super) process: &'a Process,
    /// `START-END`, as its link in `map_files` is called.
    pub(super) range: String,
    /// Without the kernel's escapes; `[uprobes]`, for what has no path.
    pub(super) path: PathBuf,
    /// Shared with others, and it may be written to.
    pub(super) writes: bool,
}

impl Mapping<'_> {
    /// Where it is in /proc.
    pub(super) fn link(&self) -> PathBuf {
        procfs::path(self.process.pid, &format!("map_files/{}", self.range))
    }
}

/// All of a tree's.
pub(super) fn read(tree: &Tree) -> Vec<Mapping<'_>> {
    let mut all = Vec::new();
    for process in &tree.processes {
        let Ok(maps) = std::fs::read(procfs::path(process.pid, "maps")) else { continue };
        let mut seen = BTreeSet::new();
        for line in maps.split(|byte| *byte == b'\n') {
            let Some(line) = Line::parse(line) else { continue };
            if seen.insert((line.path, line.identity, line.writes)) {
                let range = String::from_utf8_lossy(line.range).into_owned();
                let path = unescape(line.path);
                all.push(Mapping { process, range, path, writes: line.writes });
            }
        }
    }
    all
}

/// Mappings of the kernel's that CRIU refuses.
pub(super) fn check(mappings: &[Mapping<'_>], report: &mut Report) {
    for mapping in mappings.iter().filter(|m| m.path.as_os_str() == "[uprobes]") {
        report.add(
            "uprobes",
            format!("{} is being traced by uprobes, which CRIU does not carry", mapping.process),
            "end the tracing (perf, bpftrace, systemtap) and start the program anew",
        );
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    range: &'a [u8],
    /// Device and inode.
    identity: (&'a [u8], &'a [u8]),
    path: &'a [u8],
    writes: bool,
}

impl<'a> Line<'a> {
    /// `START-END PERM OFFSET DEV INODE   PATH`; nothing for what has no path.
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let range = fields.next()?;
        let permissions = fields.next()?;
        let (_offset, device, inode) = (fields.next()?, fields.next()?, fields.next()?);
        let path = fields.next()?.trim_ascii_start();
        let writes = permissions.get(1) == Some(&b'w') && permissions.get(3) == Some(&b's');
        (!path.is_empty()).then_some(Self { range, identity: (device, inode), path, writes })
    }
}

/// The kernel writes a newline in a path as `\012`.
fn unescape(path: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"\\012") {
            plain.push(b'\n');
            rest = after;
        } else {
            plain.push(*first);
            rest = after;
        }
    }
    OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_without_a_path_are_left_out() {
        assert_eq!(Line::parse(b"7f00-7f01 rw-p 00000000 00:00 0 "), None);
        assert_eq!(Line::parse(b"7f00-7f01 rw-p"), None);
        let line = Line::parse(b"7f00-7f01 rw-s 00000000 fe:00 12    /srv/a b (deleted)").unwrap();
        assert_eq!((line.range, line.path), (&b"7f00-7f01"[..], &b"/srv/a b (deleted)"[..]));
        assert!(line.writes);
        assert!(!Line::parse(b"7f00-7f01 rw-p 0 fe:00 12 /x").unwrap().writes);
        assert!(!Line::parse(b"7f00-7f01 r--s 0 fe:00 12 /x").unwrap().writes);
    }

    #[test]
    fn newlines_in_paths_are_undone() {
        assert_eq!(unescape(b"/a\\012b\\c"), PathBuf::from("/a\nb\\c"));
    }

    #[test]
    fn a_mapping_of_uprobes_is_a_problem() {
        let tree = Tree::read(std::process::id()).unwrap();
        let mut mappings = read(&tree);
        assert!(mappings.iter().any(|m| m.path.as_os_str() == "[vdso]"), "{mappings:?}");
        let mut report = Report::default();
        check(&mappings, &mut report);
        mappings[0].path = "[uprobes]".into();
        check(&mappings, &mut report);
        let problems = report.finish();
        assert_eq!(problems.iter().map(|p| p.code).collect::<Vec<_>>(), ["uprobes"]);
    }
}
