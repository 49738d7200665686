//! What is different in a container: its files are on another root, and what runc
//! alone knows of does not move.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::files::Access;
use super::report::Report;
use super::tree::Tree;
use super::{Findings, procfs};
use crate::keeper::container::Spec;
use crate::keeper::mounts;
use crate::workload::WorkloadError;

/// Adds what keeps a container from moving to what was found of its processes, whose
/// files get the paths that they have on the host. Those of its root are not among them
/// if that comes along: what of it was open for writing is given, by its paths in it.
///
/// # Errors
/// When its init is gone.
pub fn adapt(
    init: u32,
    spec: &Spec,
    comes_along: bool,
    findings: &mut Findings,
) -> Result<Vec<PathBuf>, WorkloadError> {
    let tree = Tree::read(init)?;
    let mut report = Report::default();
    sessions(&tree, &mut report);
    cgroups(&tree, &mut report);
    room_for_the_root(init, spec, &mut report);
    findings.problems.extend(report.finish());
    let all = mounts::of(&init.to_string()).map_err(super::super::failed("see its mounts"))?;
    let places = Places::of(spec, all.iter().map(|mount| mount.path.as_str()));
    let mut written = Vec::new();
    findings.files.retain_mut(|file| {
        if comes_along && let Some(path) = places.in_root(&file.path) {
            if file.access != Access::Read {
                written.push(path);
            }
            return false;
        }
        match places.on_host(&file.path) {
            Some(path) => {
                file.path = path;
                true
            }
            None => false,
        }
    });
    Ok(written)
}

/// Processes that somebody started in it from outside are no children of its init.
fn sessions(tree: &Tree, report: &mut Report) {
    let namespace = |pid: u32| fs::read_link(procfs::path(pid, "ns/pid")).ok();
    let own = namespace(tree.init);
    let all = procfs::numbers(&"/proc".into()).unwrap_or_default();
    for pid in all.into_iter().filter(|pid| tree.get(*pid).is_none()) {
        // One that has just been started may have been missed.
        if namespace(pid) != own || own.is_none() || is_below(pid, tree) {
            continue;
        }
        let name = procfs::read(pid, "comm").unwrap_or_default();
        report.add(
            "exec-session",
            format!("{} ({pid}) was started in the container from outside", name.trim_end()),
            "end what was started with `runc exec`",
        );
    }
}

fn is_below(pid: u32, tree: &Tree) -> bool {
    let mut pid = pid;
    // Deeper than any tree that is moved, should numbers be used again meanwhile.
    for _ in 0..1024 {
        let status = procfs::read(pid, "status").unwrap_or_default();
        pid = procfs::Status::parse(&status).parent;
        if pid == tree.init {
            return true;
        }
        if pid == 0 {
            return false;
        }
    }
    false
}

/// Cgroups that it made for itself are not made again.
fn cgroups(tree: &Tree, report: &mut Report) {
    let of = |pid: u32| procfs::read(pid, "cgroup").unwrap_or_default();
    let own = of(tree.init);
    for process in &tree.processes {
        if !process.zombie && is_elsewhere(&own, &of(process.pid)) {
            report.add(
                "nested-cgroup",
                format!("{process} is in a cgroup that the container made for itself"),
                "start it without what makes cgroups (systemd, a container engine), or move it in a VM",
            );
        }
    }
}

/// Whether a process is in other cgroups than the init; from `/proc/PID/cgroup`
/// (cgroups(7)). One that is about to end is said to be in the root of each hierarchy of
/// cgroup v1.
fn is_elsewhere(init: &str, other: &str) -> bool {
    let ends = |line: &str| !line.starts_with("0::") && line.ends_with(":/");
    init.lines().zip(other.lines()).any(|(init, other)| init != other && !ends(other))
}

/// CRIU puts the old root away in /tmp, or in a directory that it makes.
fn room_for_the_root(init: u32, spec: &Spec, report: &mut Report) {
    let tmp = fs::metadata(procfs::path(init, "root").join("tmp")).is_ok_and(|tmp| tmp.is_dir());
    if !tmp && spec.is_read_only() {
        report.add(
            "container-tmp",
            "its root file system is read-only and has no /tmp, which CRIU needs to enter it",
            "make the directory tmp in it on both hosts",
        );
    }
}

/// What of a container's paths is a file of the host's: mount points inside, and what
/// they are on the host, if anything.
struct Places(BTreeMap<PathBuf, Option<PathBuf>>);

impl Places {
    fn of<'a>(spec: &Spec, mounted: impl Iterator<Item = &'a str>) -> Self {
        let mut all: BTreeMap<_, _> = mounted.map(|path| (PathBuf::from(path), None)).collect();
        all.insert("/".into(), Some(spec.rootfs().to_owned()));
        for (inside, source) in spec.binds() {
            // A device node is not a file that is compared.
            let is_file = fs::metadata(&source)
                .is_ok_and(|m| m.is_dir() || m.mode() & 0o170_000 == 0o100_000);
            all.insert(inside, is_file.then_some(source));
        }
        Self(all)
    }

    /// The path in the root, relative to it; none of what is mounted in it.
    fn in_root(&self, inside: &Path) -> Option<PathBuf> {
        let mount = inside.ancestors().find(|path| self.0.contains_key(*path))?;
        (mount == Path::new("/")).then(|| inside.strip_prefix("/").ok().map(Path::to_owned))?
    }

    /// The path on the host; none of what is the container's own.
    fn on_host(&self, inside: &Path) -> Option<PathBuf> {
        let mount = inside.ancestors().find(|path| self.0.contains_key(*path))?;
        let source = self.0.get(mount)?.as_ref()?;
        let rest = inside.strip_prefix(mount).ok()?;
        Some(if rest.as_os_str().is_empty() { source.clone() } else { source.join(rest) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ends_is_in_no_cgroup_of_its_own_making() {
        let init = "2:memory:/migr-1\n0::/migr-1\n";
        assert!(!is_elsewhere(init, init));
        assert!(!is_elsewhere(init, "2:memory:/\n0::/migr-1\n"));
        assert!(!is_elsewhere(init, ""));
        for elsewhere in ["2:memory:/migr-1/own\n0::/migr-1\n", "2:memory:/migr-1\n0::/\n"] {
            assert!(is_elsewhere(init, elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn files_have_the_paths_of_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().to_str().unwrap();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["/bin/sh"], "cwd": "/"},
            "root": {"path": "/srv/rootfs"},
            "mounts": [
                {"destination": "/data", "type": "bind", "source": source},
                {"destination": "/gone", "type": "bind", "source": "/nowhere/at/all"},
            ],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        let spec = Spec::parse(&serde_json::to_vec(&spec).unwrap()).unwrap();
        let places = Places::of(&spec, ["/", "/proc", "/data", "/data/tmp"].into_iter());
        let on_host = |path: &str| places.on_host(Path::new(path));
        assert_eq!(on_host("/bin/sh"), Some("/srv/rootfs/bin/sh".into()));
        assert_eq!(on_host("/"), Some("/srv/rootfs".into()));
        assert_eq!(on_host("/data/x"), Some(directory.path().join("x")));
        assert_eq!(on_host("/data"), Some(directory.path().to_owned()));
        assert_eq!(places.in_root(Path::new("/var/log/x")), Some("var/log/x".into()));
        assert_eq!(places.in_root(Path::new("/data/x")), None);
        for own in ["/proc/self/exe", "/data/tmp/x", "/gone/x", "relative"] {
            assert_eq!(on_host(own), None, "{own}");
        }
    }
}
