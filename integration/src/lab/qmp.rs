//! Orders to a host's QEMU: one connection an order (QEMU Machine Protocol).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::wait;

/// Executes one command; what it returned.
///
/// # Errors
/// When QEMU is not there, or refuses.
pub fn execute(socket: &Path, command: &str, arguments: &Value) -> Result<Value> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("the host's QEMU is not at {}: is it off?", socket.display()))?;
    stream.set_read_timeout(Some(wait::LIMIT))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut stream = stream;
    // The greeting says which QEMU it is.
    lines.next().context("QEMU said nothing")??;
    ask(&mut stream, &mut lines, "qmp_capabilities", &json!({}))?;
    ask(&mut stream, &mut lines, command, arguments)
}

fn ask(
    stream: &mut UnixStream,
    lines: &mut impl Iterator<Item = std::io::Result<String>>,
    command: &str,
    arguments: &Value,
) -> Result<Value> {
    let order = json!({"execute": command, "arguments": arguments});
    stream.write_all(format!("{order}\n").as_bytes())?;
    for line in lines {
        let line = line.with_context(|| format!("QEMU did not answer {command}"))?;
        let mut answer: Value = serde_json::from_str(&line)?;
        if let Some(error) = answer.get("error") {
            bail!("QEMU refused {command}: {error}");
        }
        // Anything else is an event.
        if let Some(returned) = answer.get_mut("return") {
            return Ok(returned.take());
        }
    }
    bail!("QEMU went away at {command}")
}
