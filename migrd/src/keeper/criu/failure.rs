//! What a failure of CRIU's means: from its answer and its log to one message
//! with a remedy.
//!
//! The log holds what CRIU says and also names and paths that the workload chose.
//! Nothing is done because of it: it only chooses between sentences, and what is
//! quoted from it is cut and has no control characters.

mod causes;
mod log;

use std::fmt;

use nix::errno::Errno;

use self::causes::{CAUSES, Cause};
pub use self::log::Log;
use super::rpc::Response;

/// The longest quotation from the log (characters).
const QUOTE: usize = 300;

/// Why CRIU could not do something, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A name for the cause that does not change; `unknown` if it has none.
    pub code: &'static str,
    /// What is in the way.
    pub message: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.message, self.remedy)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// Of a dump, pre-dump or restore that was answered with `response`.
    #[must_use]
    pub fn explain(response: &Response, log: &Log) -> Self {
        // The log comes first: of several errors the response has the earliest,
        // which is often one that CRIU got over.
        let said = response.cr_errmsg.as_deref();
        let lines = || log.errors().chain(said).filter(|line| !is_harmless(line));
        // What CRIU only warns of is the cause at most where no error is.
        let warnings = log.lines().filter(|line| line.contains("Warn "));
        if let Some(failure) = lines().chain(warnings).find_map(known) {
            return failure;
        }
        let message = match (lines().next(), response.cr_errno) {
            (Some(line), _) => quote(text(line)),
            (None, Some(errno)) if errno != 0 => {
                format!(
                    "CRIU failed with \"{}\" and nothing in its log",
                    Errno::from_raw(errno).desc()
                )
            }
            (None, _) => match log.last_line() {
                Some(line) => {
                    format!("CRIU failed without saying why; its last words: {}", quote(line))
                }
                None => "CRIU failed without a word".into(),
            },
        };
        Self {
            code: "unknown",
            message,
            remedy: "CRIU's log says more; this may be something that CRIU cannot move",
        }
    }

    /// Of `criu check`, from what it said.
    #[must_use]
    pub fn of_check(said: &Log) -> Self {
        let lines = || said.errors().filter(|line| !is_harmless(line));
        // A missing capability is said without "Error".
        if let Some(failure) = said.lines().chain(lines()).find_map(known) {
            return failure;
        }
        let message = match lines().next().map(text).or_else(|| said.last_line()) {
            Some(line) => quote(line),
            None => "it fails without a word".into(),
        };
        Self {
            code: "kernel",
            message,
            remedy: "run \"criu check\" as root to see all of it; a newer CRIU or another kernel is needed",
        }
    }
}

/// The limit on descriptors is raised for trees that need it; where that is not
/// allowed CRIU complains, goes on, and leaves this as its first error.
fn is_harmless(line: &str) -> bool {
    line.contains("rlimit: Can't setup RLIMIT_NOFILE")
}

fn known(line: &str) -> Option<Failure> {
    let cause = CAUSES.iter().find(|cause| cause.is_in(line))?;
    let Cause { code, says, quoted, remedy, .. } = *cause;
    let message = if quoted { format!("{says} ({})", quote(text(line))) } else { says.to_owned() };
    Some(Failure { code, message, remedy })
}

/// A line without its time, its process and its place in CRIU's source:
/// `(00.050) Error (criu/tty.c:410): tty: …`.
fn text(line: &str) -> &str {
    let Some((_, rest)) = line.split_once("Error (") else { return line.trim() };
    rest.split_once("): ").map_or(rest, |(_, text)| text).trim()
}

fn quote(text: &str) -> String {
    let mut quoted: String =
        text.chars().take(QUOTE).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(QUOTE).is_some() {
        quoted.push('…');
    }
    quoted
}

#[cfg(test)]
mod tests;
