//! The formats of /proc (proc(5)). What does not parse counts as not there: the
//! process it is about may be gone.

use std::fs;
use std::io;
use std::path::PathBuf;

/// `/proc/PID/WHAT`.
pub(super) fn path(pid: u32, what: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{what}"))
}

/// Whether an error says that the process went away meanwhile.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// A small file of a process; `None` when there is none any more.
pub(super) fn read(pid: u32, what: &str) -> Option<String> {
    let bytes = fs::read(path(pid, what)).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The numbers that name the entries of a directory of a process: its threads
/// (`task`) or descriptors (`fd`), in order.
pub(super) fn numbers(directory: &PathBuf) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        let Ok(entry) = entry else { break };
        numbers.extend(entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// `/proc/PID/status`, as far as it matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) name: String,
    /// The letter: `R`, `S`, `Z`.
    pub(super) state: char,
    pub(super) parent: u32,
    /// Who traces it; 0: nobody.
    pub(super) tracer: u32,
    /// The leader of its session, in each pid namespace from ours down to its
    /// own; 0: not in that one.
    pub(super) sessions: Vec<u32>,
    pub(super) resident_bytes: u64,
}

impl Status {
    pub(super) fn parse(text: &str) -> Self {
        let mut status = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let number = |text: &str| text.parse::<u32>().unwrap_or(0);
            match key {
                "Name" => value.clone_into(&mut status.name),
                "State" => status.state = value.chars().next().unwrap_or(' '),
                "PPid" => status.parent = number(value),
                "TracerPid" => status.tracer = number(value),
                "NSsid" => status.sessions = value.split_whitespace().map(number).collect(),
                "VmRSS" => {
                    let kib = value.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
                    status.resident_bytes = kib.unwrap_or(0).saturating_mul(1024);
                }
                _ => {}
            }
        }
        status
    }
}

/// `/proc/PID/fdinfo/N`, as far as it matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FdInfo {
    pub(super) flags: i32,
    pub(super) mount: Option<u32>,
    /// The locks that are held through it, as /proc/locks says them.
    pub(super) locks: Vec<String>,
    /// Of a pseudoterminal's master: which.
    pub(super) tty_index: Option<u32>,
    /// Of a pidfd: whose; -1: of one that is gone.
    pub(super) pid: Option<i64>,
    /// Of a tun device: the interface it is attached to.
    pub(super) interface: Option<String>,
    /// Of an eventfd: it is a semaphore.
    pub(super) semaphore: bool,
}

impl FdInfo {
    pub(super) fn parse(text: &str) -> Self {
        let mut info = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            match key {
                "flags" => info.flags = i32::from_str_radix(value, 8).unwrap_or(0),
                "mnt_id" => info.mount = value.parse().ok(),
                "lock" => info.locks.push(value.to_owned()),
                "tty-index" => info.tty_index = value.parse().ok(),
                "Pid" => info.pid = value.parse().ok(),
                "eventfd-semaphore" => info.semaphore = value == "1",
                "iff" => info.interface = (!value.is_empty()).then(|| value.to_owned()),
                _ => {}
            }
        }
        info
    }
}

/// The ids of the mounts in a `mountinfo`, and where they are. A path with a blank or
/// the like in it is as the kernel writes it.
pub(super) fn mount_points(mountinfo: &str) -> impl Iterator<Item = (u32, &str)> {
    mountinfo.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let id = words.next()?.parse().ok()?;
        Some((id, words.nth(3)?))
    })
}

/// The ids of the mounts in a `mountinfo`.
pub(super) fn mounts(mountinfo: &str) -> impl Iterator<Item = u32> {
    mount_points(mountinfo).map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_gives_what_it_says_and_nothing_else() {
        let text = "Name:\tpython3\nState:\tZ (zombie)\nPPid:\t7\nTracerPid:\t12\n\
                    NSsid:\t900\t0\nVmRSS:\t  2048 kB\nnonsense\n";
        let status = Status::parse(text);
        assert_eq!((status.name.as_str(), status.state), ("python3", 'Z'));
        assert_eq!((status.parent, status.tracer, status.sessions), (7, 12, vec![900, 0]));
        assert_eq!(status.resident_bytes, 2 << 20);
        assert_eq!(Status::parse("VmRSS:\tmany kB\nPPid:\t-3"), Status::default());
    }

    #[test]
    fn a_descriptors_info_gives_flags_mount_and_locks() {
        let text = "pos:\t0\nflags:\t02100001\nmnt_id:\t27\nino:\t5\n\
                    lock:\t1: POSIX  ADVISORY  WRITE 17 fe:00:5 0 EOF\ntty-index:\t4\niff:\t\n";
        let info = FdInfo::parse(text);
        assert_eq!(info.flags & libc::O_ACCMODE, libc::O_WRONLY);
        assert_eq!((info.mount, info.tty_index, info.interface), (Some(27), Some(4), None));
        assert_eq!(info.locks, ["1: POSIX  ADVISORY  WRITE 17 fe:00:5 0 EOF"]);
        assert_eq!(FdInfo::parse("flags:\t9z\npos"), FdInfo::default());
        let event = |value: u32| FdInfo::parse(&format!("eventfd-semaphore: {value}\n")).semaphore;
        assert!(event(1) && !event(0));
    }
}
