//! What goes over a command channel: one JSON object a line, both ways. A
//! session begins with a greeting that is given back, so that leftovers of the
//! session before are told apart.

use std::io::{self, BufRead, Read, Write};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most bytes of output or input in one message.
pub const MAX_DATA: usize = 32 << 10;
/// The longest line that is read.
const MAX_LINE: u64 = 1 << 20;

/// Bytes, base64 on the channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data(pub Vec<u8>);

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A program to run in a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The program and its arguments.
    pub words: Vec<String>,
    /// What is added to the agent's environment.
    pub environment: Vec<(String, String)>,
}

/// From outside to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Begins a session: what the one before left running in the foreground is
    /// killed.
    Hello {
        /// Given back.
        nonce: String,
    },
    /// Runs a program; its output and its end are replied.
    Run {
        /// The program.
        order: Order,
    },
    /// Input of the program that runs.
    Input {
        /// Some of it.
        data: Data,
    },
    /// There is no more input.
    InputEnds,
    /// Starts a program that outlives the session, with its output appended to
    /// a file.
    Spawn {
        /// The program.
        order: Order,
        /// Path of the file.
        log: String,
    },
    /// Sets the host's clock.
    SetClock {
        /// To that, in ns since 1970.
        unix_ns: i64,
    },
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The session has begun.
    Hello {
        /// As it was given.
        nonce: String,
    },
    /// The program printed something.
    Output {
        /// To standard error, not standard output.
        error: bool,
        /// What.
        data: Data,
    },
    /// The program has ended.
    Exited {
        /// Its exit status; -1 when a signal ended it.
        status: i32,
    },
    /// The program was started.
    Spawned {
        /// Its process id in the host.
        pid: u32,
    },
    /// It was done.
    Done,
    /// It could not be done.
    Failed {
        /// Why.
        message: String,
    },
}

/// Writes one message.
///
/// # Errors
/// Those of writing.
pub fn send(out: &mut impl Write, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()?;
    Ok(())
}

/// Reads one message; none at the end of the stream. Lines that are no message
/// are left out while `between_sessions`.
///
/// # Errors
/// When what comes is not a message, or those of reading.
pub fn receive<T: DeserializeOwned>(
    input: &mut impl BufRead,
    between_sessions: bool,
) -> Result<Option<T>> {
    loop {
        let mut line = Vec::new();
        let read = loop {
            match input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if read == 0 {
            return Ok(None);
        }
        match serde_json::from_slice(&line) {
            Ok(message) => return Ok(Some(message)),
            Err(_) if between_sessions => {}
            Err(error) => {
                ensure!(line.ends_with(b"\n"), "the channel ended in the middle of a message");
                return Err(error).context("what came over the channel is no message");
            }
        }
    }
}

/// The reply, when it is not a refusal.
///
/// # Errors
/// The refusal, or that nothing came.
pub fn accepted(reply: Option<Reply>) -> Result<Reply> {
    match reply {
        Some(Reply::Failed { message }) => bail!("{message}"),
        Some(reply) => Ok(reply),
        None => bail!("the channel to the host was closed: was it powered off?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_pass() {
        let all = Data((0..=255).collect());
        let mut line = Vec::new();
        send(&mut line, &Reply::Output { error: true, data: all.clone() }).expect("sent");
        let back: Option<Reply> = receive(&mut line.as_slice(), false).expect("received");
        assert_eq!(back, Some(Reply::Output { error: true, data: all }));
    }

    #[test]
    fn leftovers_are_left_out_only_between_sessions() {
        let text = b"put\":1}\n{\"Hello\":{\"nonce\":\"a\"}}\n";
        let hello = Some(Reply::Hello { nonce: "a".into() });
        assert_eq!(receive::<Reply>(&mut text.as_slice(), true).expect("a message"), hello);
        assert!(receive::<Reply>(&mut text.as_slice(), false).is_err());
        assert!(receive::<Reply>(&mut b"".as_slice(), false).expect("the end").is_none());
    }
}
