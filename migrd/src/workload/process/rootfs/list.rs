//! What is in a root file system, by number. Lists come from a peer: everything in one
//! is checked before anything is made of it.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use migr_proto::v1 as proto;
use nix::sys::stat::SFlag;

use super::attributes::{self, Attribute};
use super::extents::{Extent, Extents};
use super::{Devices, LIST_PAGES, MAX_NODES, RootfsError, pages_of};
use crate::units::PAGE_SIZE;

/// The longest name in a directory, and the longest path, in bytes (`NAME_MAX`,
/// `PATH_MAX` without its NUL).
const NAME_BYTES: usize = 255;
const PATH_BYTES: usize = 4095;

/// What something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// In bytes.
        size: u64,
        /// Where its content is in the stream; 0 of an empty one.
        first_page: u64,
    },
    /// Another name of a regular file.
    Same(u32),
    /// A symbolic link, and where it leads.
    Link(Vec<u8>),
    /// A named pipe.
    Pipe,
    /// A Unix socket that was bound.
    Socket,
    /// A device.
    Device {
        /// Whether it is a block device.
        block: bool,
        /// Its numbers.
        major: u32,
        /// The other one.
        minor: u32,
    },
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    /// Number of the directory that it is in.
    pub(super) parent: u32,
    /// In that; of the root empty.
    pub(super) name: Vec<u8>,
    pub(super) what: What,
    /// Permissions, with the three bits above them.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// When it was last written, in ns since the Unix epoch.
    pub(super) mtime_ns: i64,
    pub(super) attributes: Vec<Attribute>,
}

/// What a host takes of a peer.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// Length of the stream, in pages.
    pub(super) pages: u64,
    /// Devices that the container may have.
    pub(super) devices: Devices,
}

/// A root file system that could be; numbers that are not in it any more are empty.
#[derive(Clone, Debug)]
pub(super) struct List {
    nodes: Vec<Option<Node>>,
    paths: Vec<PathBuf>,
}

fn odd(what: impl Into<String>) -> RootfsError {
    RootfsError::Odd(what.into())
}

fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl Node {
    /// As a message.
    pub(super) fn to_wire(&self) -> proto::RootfsNode {
        let Self { parent, name, what, mode, uid, gid, mtime_ns, attributes } = self;
        let mut node = proto::RootfsNode {
            parent: *parent,
            name: name.clone().into(),
            uid: *uid,
            gid: *gid,
            mtime_ns: *mtime_ns,
            ..proto::RootfsNode::default()
        };
        let format = match what {
            What::Directory => SFlag::S_IFDIR,
            What::File { size, first_page } => {
                (node.size, node.first_page) = (*size, *first_page);
                SFlag::S_IFREG
            }
            What::Same(other) => {
                node.same_as = *other;
                SFlag::S_IFREG
            }
            What::Link(target) => {
                node.target = target.clone().into();
                SFlag::S_IFLNK
            }
            What::Pipe => SFlag::S_IFIFO,
            What::Socket => SFlag::S_IFSOCK,
            What::Device { block, major, minor } => {
                (node.major, node.minor) = (*major, *minor);
                if *block { SFlag::S_IFBLK } else { SFlag::S_IFCHR }
            }
        };
        node.mode = mode | format.bits();
        node.attributes = attributes
            .iter()
            .map(|(name, value)| proto::RootfsAttribute {
                name: name.clone().into(),
                value: value.clone().into(),
            })
            .collect();
        node
    }

    fn from_wire(node: proto::RootfsNode) -> Result<Self, RootfsError> {
        let proto::RootfsNode {
            parent,
            name,
            mode,
            uid,
            gid,
            mtime_ns,
            size,
            first_page,
            target,
            major,
            minor,
            attributes,
            same_as,
        } = node;
        let format = SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits());
        let what = match format {
            SFlag::S_IFDIR => What::Directory,
            SFlag::S_IFREG if same_as > 0 => What::Same(same_as),
            SFlag::S_IFREG => What::File { size, first_page },
            SFlag::S_IFLNK => What::Link(target.into()),
            SFlag::S_IFIFO => What::Pipe,
            SFlag::S_IFSOCK => What::Socket,
            SFlag::S_IFBLK | SFlag::S_IFCHR => {
                What::Device { block: format == SFlag::S_IFBLK, major, minor }
            }
            _ => return Err(odd("something in it is of no known kind")),
        };
        if mode & !(SFlag::S_IFMT.bits() | 0o7777) != 0 {
            return Err(odd("a mode has bits that no file has"));
        }
        let pair = |a: proto::RootfsAttribute| (a.name.into(), a.value.into());
        let attributes = attributes.into_iter().map(pair).collect();
        let (name, mode) = (name.into(), mode & 0o7777);
        Ok(Self { parent, name, what, mode, uid, gid, mtime_ns, attributes })
    }

    fn check(&self, rules: &Rules) -> Result<(), RootfsError> {
        match &self.what {
            What::File { size: 0, first_page } if *first_page != 0 => {
                return Err(odd("an empty file has content"));
            }
            What::File { size, first_page } if *size > 0 => {
                let end = first_page.checked_add(pages_of(*size));
                if *first_page < LIST_PAGES || end.is_none_or(|end| end > rules.pages) {
                    return Err(odd("the content of a file is outside of the stream"));
                }
            }
            What::Link(target)
                if target.is_empty() || target.len() > PATH_BYTES || target.contains(&0) =>
            {
                return Err(odd("a symbolic link leads to what is no path"));
            }
            What::Device { block, major, minor } if !rules.devices.has(*block, *major, *minor) => {
                return Err(odd(format!(
                    "it has the device {major}:{minor}, which its config.json does not give it"
                )));
            }
            _ => {}
        }
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return Err(odd("somebody who can't be owns something in it"));
        }
        let attributes = &self.attributes;
        let names: HashSet<_> = attributes.iter().map(|(name, _)| name).collect();
        let right = attributes
            .iter()
            .all(|(name, value)| attributes::travels(name) && value.len() <= attributes::LONGEST);
        let has_some = matches!(self.what, What::Directory | What::File { .. });
        if !right
            || names.len() != attributes.len()
            || attributes.len() > attributes::MOST
            || !(has_some || attributes.is_empty())
        {
            return Err(odd("something has attributes that it can't have"));
        }
        Ok(())
    }
}

/// Whether that can be the name of something in a directory.
fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}

impl List {
    /// That of an offer.
    ///
    /// # Errors
    /// When it can't be of a root file system.
    pub(super) fn from_wire(list: proto::RootfsList, rules: &Rules) -> Result<Self, RootfsError> {
        if list.nodes.len() > MAX_NODES {
            return Err(odd(format!("it has more than {MAX_NODES} files")));
        }
        let nodes = list.nodes.into_iter().map(|node| Node::from_wire(node).map(Some));
        Self::checked(nodes.collect::<Result<_, _>>()?, rules)
    }

    /// What became of it.
    ///
    /// # Errors
    /// When the changes can't be.
    pub(super) fn after(
        &self,
        changes: proto::RootfsChanges,
        rules: &Rules,
    ) -> Result<Self, RootfsError> {
        let proto::RootfsChanges { removed, changed, version: _ } = changes;
        let mut nodes = self.nodes.clone();
        for number in removed {
            let gone = nodes.get_mut(index(number)).and_then(Option::take);
            gone.ok_or_else(|| odd("something is gone that was never there"))?;
        }
        for proto::RootfsChange { number, node } in changed {
            let node = Node::from_wire(node.ok_or_else(|| odd("a change says nothing"))?)?;
            if index(number) == nodes.len() && nodes.len() < MAX_NODES {
                nodes.push(Some(node));
                continue;
            }
            let before = nodes.get_mut(index(number)).and_then(Option::as_mut);
            match before {
                Some(before) if (before.parent, &before.name) == (node.parent, &node.name) => {
                    *before = node;
                }
                _ => return Err(odd("a change is of something else, or has a number too high")),
            }
        }
        Self::checked(nodes, rules)
    }

    fn checked(nodes: Vec<Option<Node>>, rules: &Rules) -> Result<Self, RootfsError> {
        let mut paths: Vec<PathBuf> = Vec::with_capacity(nodes.len());
        let mut names: HashSet<(u32, &[u8])> = HashSet::with_capacity(nodes.len());
        let mut extents: BTreeMap<u64, u64> = BTreeMap::new();
        let root = nodes.first().and_then(Option::as_ref);
        if !root.is_some_and(|r| r.what == What::Directory && r.name.is_empty() && r.parent == 0) {
            return Err(odd("it has no root"));
        }
        let what = |number: u32, below: usize| {
            let before = (index(number) < below).then(|| nodes.get(index(number)));
            before.flatten().and_then(Option::as_ref).map(|node| &node.what)
        };
        for (number, node) in nodes.iter().enumerate() {
            let Some(node) = node else {
                paths.push(PathBuf::new());
                continue;
            };
            node.check(rules)?;
            if number == 0 {
                paths.push(PathBuf::new());
                continue;
            }
            if !is_name(&node.name) || !names.insert((node.parent, &node.name)) {
                return Err(odd("something has a name that it can't have"));
            }
            if what(node.parent, number) != Some(&What::Directory) {
                return Err(odd("something is in what is no directory"));
            }
            let path = paths[index(node.parent)].join(OsStr::from_bytes(&node.name));
            if path.as_os_str().len() > PATH_BYTES {
                return Err(odd("a path is too long"));
            }
            paths.push(path);
            match &node.what {
                What::Same(other) if !matches!(what(*other, number), Some(What::File { .. })) => {
                    return Err(odd("something is another name of what is no file"));
                }
                What::File { size, first_page }
                    if *size > 0
                        && extents.insert(*first_page, first_page + pages_of(*size)).is_some() =>
                {
                    return Err(odd("two files have the same content"));
                }
                _ => {}
            }
        }
        let ends = extents.values();
        if ends.zip(extents.keys().skip(1)).any(|(end, next)| end > next) {
            return Err(odd("two files have the same content"));
        }
        Ok(Self { nodes, paths })
    }

    pub(super) fn get(&self, number: u32) -> Option<&Node> {
        self.nodes.get(index(number))?.as_ref()
    }

    /// Its path, relative to the root; of the root itself empty.
    pub(super) fn path(&self, number: u32) -> &Path {
        self.paths.get(index(number)).map_or(Path::new(""), PathBuf::as_path)
    }

    /// All that are there, by number.
    pub(super) fn all(&self) -> impl DoubleEndedIterator<Item = (u32, &Node)> {
        let numbered = self.nodes.iter().enumerate();
        numbered.filter_map(|(at, node)| Some((u32::try_from(at).ok()?, node.as_ref()?)))
    }

    /// Where the content of its files is.
    pub(super) fn extents(&self) -> Extents {
        let of = |(number, node): (u32, &Node)| match node.what {
            What::File { size, first_page } if size > 0 => {
                Some(Extent { first: first_page, size, number })
            }
            _ => None,
        };
        Extents::new(self.all().filter_map(of).collect())
    }
}

/// How many bytes of the stream come before the content of files.
pub(super) fn list_bytes() -> u64 {
    LIST_PAGES * PAGE_SIZE
}
