//! Why a command ends without success, and how that is said on stderr.

use std::io::{self, Write};

use serde::Serialize;

use crate::args::Format;
use crate::client::ClientError;
use crate::units::plain;

/// Exit statuses; part of the contract with scripts.
pub mod exit {
    pub const DONE: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const USAGE: u8 = 2;
    pub const REFUSED: u8 = 3;
    pub const STILL_AT_SOURCE: u8 = 4;
    pub const CANCELLED: u8 = 5;
    pub const IN_DOUBT: u8 = 6;
    /// As a shell reports a program that SIGINT ended.
    pub const DETACHED: u8 = 130;
    /// As a shell reports a program that SIGPIPE ended.
    pub const BROKEN_PIPE: u8 = 141;
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    Usage(String),
    #[error("cannot write to standard output: {0}")]
    Stdout(io::Error),
    #[error("cannot set up the terminal: {0}")]
    Terminal(nix::Error),
    #[error("cannot wait for signals: {0}")]
    Signals(io::Error),
    #[error("{workload} moves from host to host without ever staying ({hops} moves)")]
    Chasing { workload: String, hops: u32 },
}

impl Failure {
    /// The exit status it leads to.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_) => exit::USAGE,
            Self::Stdout(error) if error.kind() == io::ErrorKind::BrokenPipe => exit::BROKEN_PIPE,
            Self::Client(_)
            | Self::Stdout(_)
            | Self::Terminal(_)
            | Self::Signals(_)
            | Self::Chasing { .. } => exit::FAILED,
        }
    }

    /// Says it on stderr. A reader that went away is no error to speak of.
    pub fn report(&self, format: Format) {
        if self.exit_status() == exit::BROKEN_PIPE {
            return;
        }
        let message = self.to_string();
        let (code, host, phase, remedy) = match self {
            Self::Client(error) => {
                (Some(error.code()), Some(error.host()), error.phase(), error.remedy())
            }
            Self::Usage(_) => (Some("usage"), None, None, None),
            Self::Stdout(_) | Self::Terminal(_) | Self::Signals(_) | Self::Chasing { .. } => {
                (None, None, None, None)
            }
        };
        Report { message: &message, code, host, phase, remedy: remedy.as_deref() }.write(format);
    }
}

/// One problem, as it appears on stderr.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    pub message: &'a str,
    pub code: Option<&'a str>,
    pub host: Option<&'a str>,
    pub phase: Option<&'a str>,
    pub remedy: Option<&'a str>,
}

impl Report<'_> {
    /// Writes it: lines for people, or one object `{"error":{…}}`.
    pub fn write(&self, format: Format) {
        match format {
            Format::Human => to_stderr(&self.lines()),
            Format::Json => to_stderr(&serde_json::json!({ "error": self }).to_string()),
        }
    }

    fn lines(&self) -> String {
        let mut text = format!("migctl: {}", plain(self.message));
        // A wrong command line needs no name.
        let code = self.code.filter(|code| *code != "usage");
        for (label, value) in [
            ("code", code),
            ("host", self.host),
            ("phase", self.phase),
            ("what to do", self.remedy),
        ] {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                text.push_str(&format!("\n  {label}: {}", plain(value)));
            }
        }
        text
    }
}

/// A remark on stderr that is no error.
pub fn note(format: Format, text: &str) {
    match format {
        Format::Human => to_stderr(&format!("migctl: {}", plain(text))),
        Format::Json => to_stderr(&serde_json::json!({ "note": text }).to_string()),
    }
}

/// One line to stderr. If even stderr is closed there is nowhere to say so.
pub fn to_stderr(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_where_and_what_to_do() {
        let report = Report {
            message: "cannot run web: no such kernel",
            code: Some("no-kernel"),
            host: Some("a:1"),
            phase: None,
            remedy: Some("check --kernel"),
        };
        assert_eq!(
            report.lines(),
            "migctl: cannot run web: no such kernel\n  code: no-kernel\n  host: a:1\n  \
             what to do: check --kernel"
        );
        let wrong = Report { code: Some("usage"), host: None, remedy: None, ..report };
        assert_eq!(wrong.lines(), "migctl: cannot run web: no such kernel");
    }
}
