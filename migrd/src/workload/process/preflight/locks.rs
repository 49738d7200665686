//! Locks on files, which CRIU carries when it is told to.

use super::Options;
use super::descriptors::{Descriptor, Kind};
use super::report::Report;

pub(super) fn check(descriptors: &[Descriptor<'_>], options: &Options, report: &mut Report) {
    if options.file_locks {
        return;
    }
    for descriptor in descriptors.iter().filter(|d| !d.info.locks.is_empty()) {
        let what = match &descriptor.kind {
            Kind::Path(path) => path.display().to_string(),
            _ => "a file without a name".to_owned(),
        };
        report.add(
            "file-lock",
            format!("{descriptor} holds a lock on {what} ({})", kinds(&descriptor.info.locks)),
            "say --file-locks: the lock is taken again at the destination; on shared storage \
             make sure that nobody else wants it meanwhile",
        );
    }
}

/// `POSIX WRITE, FLOCK READ`, of lines of /proc/locks.
fn kinds(locks: &[String]) -> String {
    let kind = |lock: &String| {
        let words: Vec<_> = lock.split_whitespace().collect();
        match words[..] {
            [_, kind, _, access, ..] => format!("{kind} {access}"),
            _ => lock.clone(),
        }
    };
    locks.iter().map(kind).collect::<Vec<_>>().join(", ")
}
