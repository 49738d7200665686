//! What keeps a tree that was not started here from being taken over, beyond what
//! keeps any tree from moving: it is made anew beside the original, on the same host,
//! and in a PID namespace of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::descriptors::{self, Kind};
use super::places::namespace;
use super::procfs;
use super::report::Report;
use super::tree::Tree;
use super::{Options, scan};
use crate::sys::process::start_time;
use crate::workload::{Problem, WorkloadError};

/// All that a tree shares with its host: its copy is made of the host's, and what it
/// does not get there it must not have had.
const SHARED: [&str; 8] = ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup", "time"];
/// Where a tree of this host's has file systems of its own, or none.
const OTHERWISE: [&str; 4] = ["/dev/shm", "/dev/pts", "/run/user", "/sys/fs/cgroup"];
/// Tables of sockets that are bound to a port (proc_pid_net(5)).
const PORTS: [&str; 6] = ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6"];

/// A process that is to be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adoptable {
    /// When it was started, in clock ticks since the host was: with its number, that
    /// names it for good.
    pub start_time: u64,
    /// Its command line.
    pub argv: Vec<String>,
    /// Its directory.
    pub cwd: String,
    /// Memory of it and of all below it, in bytes.
    pub resident_bytes: u64,
}

/// Looks at the process `pid` and all below it, and says what it is and what keeps it
/// from being taken over. Blocks for some milliseconds.
///
/// # Errors
/// When there is no such process, or /proc can't be read.
pub fn look(pid: u32, ghost_limit_bytes: u64) -> Result<(Adoptable, Vec<Problem>), WorkloadError> {
    let gone = || WorkloadError::new(format!("there is no process {pid} on this host"));
    let start_time = start_time(pid).ok_or_else(gone)?;
    let mut report = Report::default();
    if !may_be_taken(pid, &mut report) {
        return Ok((adoptable(pid, start_time, 0), report.finish()));
    }
    let options = Options { ghost_limit_bytes, ..Options::default() };
    let found = scan(pid, &options)?;
    let tree = Tree::read(pid)?;
    begun_inside(&tree, &mut report);
    shares(&tree, &mut report);
    bound(&tree, &mut report);
    for file in &found.files {
        if OTHERWISE.iter().any(|other| file.path.starts_with(other)) {
            report.add(
                "file-outside-mounts",
                format!("it uses {}, which a workload does not see", file.path.display()),
                "start it by \"migctl exec-process\"",
            );
        }
    }
    let problems = found.problems.into_iter().map(for_adoption).chain(report.finish()).collect();
    Ok((adoptable(pid, start_time, found.resident_bytes), problems))
}

fn adoptable(pid: u32, start_time: u64, resident_bytes: u64) -> Adoptable {
    let line = fs::read(procfs::path(pid, "cmdline")).unwrap_or_default();
    let line = line.strip_suffix(&[0]).unwrap_or(&line);
    let argv = line.split(|byte| *byte == 0).map(|w| String::from_utf8_lossy(w).into_owned());
    let cwd = fs::read_link(procfs::path(pid, "cwd")).unwrap_or_else(|_| "/".into());
    let cwd = cwd.to_string_lossy().into_owned();
    Adoptable { start_time, argv: argv.collect(), cwd, resident_bytes }
}

/// Whether it is a process that can be somebody's workload at all.
fn may_be_taken(pid: u32, report: &mut Report) -> bool {
    let before = report.count();
    let mut no = |what: &str, remedy: &str| {
        report.add("not-adoptable", format!("process {pid} {what}"), remedy.to_owned());
    };
    let other = "name the first process of a program";
    if pid == 1 {
        no("is the first process of this host", other);
    } else if fs::read_link(procfs::path(pid, "exe")).is_err() {
        no("is a thread of the kernel, or is ending", other);
    }
    let mut ancestor = std::process::id();
    while ancestor > 1 {
        if ancestor == pid {
            no("is this daemon, or has it below it", other);
        }
        let status = procfs::read(ancestor, "status").unwrap_or_default();
        ancestor = procfs::Status::parse(&status).parent;
    }
    let groups = procfs::read(pid, "cgroup").unwrap_or_default();
    if groups.lines().any(|line| line.strip_prefix("0::/migr-").is_some()) {
        no("belongs to a workload of migr already", "see \"migctl list\"");
    }
    report.count() == before
}

/// Sessions and process groups have to be led from inside: their leaders' numbers
/// would mean nothing in another PID namespace.
fn begun_inside(tree: &Tree, report: &mut Report) {
    let inside: BTreeSet<u32> = tree.processes.iter().map(|process| process.pid).collect();
    for process in &tree.processes {
        let stat = procfs::read(process.pid, "stat").unwrap_or_default();
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        let field = |n: usize| after.split_whitespace().nth(n).and_then(|f| f.parse().ok());
        for (what, leader) in [("process group", field(2)), ("session", field(3))] {
            let Some(leader) = leader else { continue };
            if !inside.contains(&leader) {
                report.add(
                    "session-outside",
                    format!("the {what} of {process} was begun outside, by process {leader}"),
                    "start it in a session of its own (setsid), or name that process",
                );
            }
        }
    }
}

fn shares(tree: &Tree, report: &mut Report) {
    for process in &tree.processes {
        for kind in SHARED {
            let (mine, here) = (namespace(process.pid, kind), namespace(std::process::id(), kind));
            if mine != here {
                report.add(
                    "nested-namespace",
                    format!("{process} is in another {kind} namespace than migrd"),
                    "start it by \"migctl exec-process\"; a container by its own tools",
                );
            }
        }
        let root = fs::read_link(procfs::path(process.pid, "root"));
        if root.is_ok_and(|root| root != Path::new("/")) {
            report.add(
                "nested-namespace",
                format!("{process} has another root directory than migrd"),
                "start it by \"migctl exec-process\"",
            );
        }
    }
}

/// Names of sockets exist once on a host, and the original has them until its copy is
/// complete.
fn bound(tree: &Tree, report: &mut Report) {
    let descriptors = descriptors::read(tree);
    let sockets: BTreeMap<u64, _> = descriptors
        .iter()
        .filter_map(|descriptor| match descriptor.kind {
            Kind::Socket(inode) => Some((inode, descriptor)),
            _ => None,
        })
        .collect();
    if sockets.is_empty() {
        return;
    }
    let table = |name: &str| procfs::read(tree.init, &format!("net/{name}")).unwrap_or_default();
    let ports = PORTS.iter().flat_map(|name| {
        let rows: Vec<_> = table(name).lines().skip(1).filter_map(port).collect();
        rows.into_iter().map(move |(inode, port)| (inode, format!("{name} port {port}")))
    });
    let names: Vec<_> = table("unix").lines().skip(1).filter_map(unix_name).collect();
    for (inode, name) in ports.chain(names) {
        if let Some(descriptor) = sockets.get(&inode) {
            report.add(
                "socket-bound",
                format!("{descriptor} is a socket that has a name, {name}"),
                "start it by \"migctl exec-process\": two can't have that name for a moment",
            );
        }
    }
}

/// Inode and port of a row of a table of ports, if it has one.
fn port(row: &str) -> Option<(u64, u16)> {
    let fields: Vec<_> = row.split_whitespace().collect();
    let (_, port) = fields.get(1)?.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok().filter(|port| *port > 0)?;
    Some((fields.get(9)?.parse().ok()?, port))
}

/// Inode and name of a row of the table of Unix sockets, if it has one.
fn unix_name(row: &str) -> Option<(u64, String)> {
    let mut fields = row.split_whitespace().skip(6);
    let inode = fields.next()?.parse().ok()?;
    fields.next().map(|name| (inode, name.to_owned()))
}

/// A problem of moving, with what helps against it here.
fn for_adoption(problem: Problem) -> Problem {
    let remedy = match problem.code {
        "file-lock" => "have the program release it first: the original holds it meanwhile",
        "established-tcp" | "tcp-not-accepted" => {
            "end those connections first, or start it by \"migctl exec-process\""
        }
        "deleted-file" if problem.remedy.contains("--link-remap") => {
            "have the program close it first"
        }
        _ => return problem,
    };
    Problem { remedy: remedy.to_owned(), ..problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_tables_say_who_has_which_name() {
        let row = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     \
                   0        0 4711 1 0000000000000000 100 0 0 10 0";
        assert_eq!(port(row), Some((4711, 8080)));
        assert_eq!(port(&row.replace(":1F90", ":0000")), None);
        assert_eq!(port("nonsense"), None);
        let row = "0000000000000000: 00000002 00000000 00010000 0001 01 815 @/tmp/x";
        assert_eq!(unix_name(row), Some((815, "@/tmp/x".to_owned())));
        assert_eq!(unix_name("0000000000000000: 00000002 00000000 00010000 0001 03 815"), None);
    }

    #[test]
    fn neither_this_process_nor_what_began_it_can_be_adopted() {
        let me = std::process::id();
        let (_, problems) = look(me, 0).unwrap();
        assert!(problems.iter().any(|problem| problem.code == "not-adoptable"), "{problems:?}");
        assert!(look(u32::MAX, 0).unwrap_err().message.contains("no process"));
        let (_, problems) = look(1, 0).unwrap();
        assert!(problems.iter().any(|problem| problem.code == "not-adoptable"), "{problems:?}");
    }

    #[test]
    fn a_session_that_began_outside_and_a_name_of_a_socket_are_found() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        // Between fork and exec it is another program.
        let cmdline = format!("/proc/{}/cmdline", child.id());
        while !std::fs::read(&cmdline).unwrap().starts_with(b"sleep") {
            std::thread::yield_now();
        }
        let (found, problems) = look(child.id(), 0).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((found.argv, found.start_time > 0), (vec!["sleep".into(), "1000".into()], true));
        let codes: Vec<_> = problems.iter().map(|problem| problem.code).collect();
        assert!(codes.contains(&"session-outside"), "{problems:?}");
    }
}
