//! The terminal that `console` borrows.

use std::io::{self, IsTerminal};

use nix::sys::termios::{self, OutputFlags, SetArg, Termios};

/// Raw mode of the terminal on stdin. Dropping it, also while a panic unwinds,
/// puts the terminal back as it was.
pub struct RawMode {
    original: Termios,
}

impl RawMode {
    /// Enters raw mode; none if stdin is not a terminal.
    pub fn enter() -> Result<Option<Self>, nix::Error> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let original = termios::tcgetattr(io::stdin())?;
        let mut raw = original.clone();
        termios::cfmakeraw(&mut raw);
        // A guest that ends lines with a bare newline stays readable this way.
        raw.output_flags.insert(OutputFlags::OPOST | OutputFlags::ONLCR);
        termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(Some(Self { original }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.original);
    }
}
