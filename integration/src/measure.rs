//! One move, measured from outside: by the guest's own heartbeats, and beside
//! a plain copy of as many bytes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use migr_proto::v1::LogsRequest;
use migr_proto::v1::control_client::ControlClient;
use serde::Serialize;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::host_pair::migrate;
use crate::scenario::{self, Heartbeats};

/// The least, the middle and the greatest of several figures.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The one in the middle.
    pub median: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// Of `figures`, to the thousandth.
    ///
    /// # Errors
    /// When there are none.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Result<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().map(to_thousandth).collect();
        sorted.sort_by(f64::total_cmp);
        let median = *sorted.get(sorted.len() / 2).context("no figures")?;
        Ok(Self { min: sorted[0], median, max: sorted[sorted.len() - 1] })
    }
}

/// Rounded to three places.
#[must_use]
pub fn to_thousandth(figure: f64) -> f64 {
    (figure * 1000.0).round() / 1000.0
}

/// A move and what the guest noticed of it.
#[derive(Clone, Debug)]
pub struct Measured {
    /// What `migctl migrate` printed.
    pub result: Value,
    /// Between the last heartbeat at the source and the first at the
    /// destination, in ms.
    pub gap_ms: f64,
    /// The longest time between two heartbeats at the source, from the request
    /// to the stop, in ms.
    pub brownout_ms: f64,
    /// The byte of the guest's output with which the destination began.
    pub boundary: u64,
    /// All heartbeats so far.
    pub heartbeats: Heartbeats,
}

impl Measured {
    /// A figure of the result.
    ///
    /// # Errors
    /// When it is not there.
    pub fn figure(&self, name: &str) -> Result<f64> {
        let figure = self.result[name].as_f64();
        figure.with_context(|| format!("no {name} in {}", self.result))
    }
}

/// Moves `name` and looks at its heartbeats around the move.
///
/// # Errors
/// When the move does not complete or the log does not show it.
pub fn measured(from: &Daemon, to: &Daemon, name: &str, options: &[&str]) -> Result<Measured> {
    let boundary = boundary(from, name)?;
    let started = unix_ns()?;
    let result = migrate(from, to, name, options)?.ok()?.json()?;
    let boundary = boundary.join().map_err(|_| anyhow!("the follower of the log panicked"))??;
    let now = scenario::heartbeats(to, name)?.last_pass();
    let heartbeats = scenario::wait_for_pass(to, name, now + 3)?;
    let gap = heartbeats.gap_at(boundary).context("no heartbeats around the move")?;
    Ok(Measured {
        result,
        gap_ms: milliseconds(gap),
        brownout_ms: milliseconds(heartbeats.longest_interval(started, boundary)),
        boundary,
        heartbeats,
    })
}

/// ns as ms.
#[must_use]
pub fn milliseconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64() * 1000.0
}

fn unix_ns() -> Result<u64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(u64::try_from(now.as_nanos())?)
}

/// Follows the log at `from` until it says where the output at this host ended.
fn boundary(from: &Daemon, name: &str) -> Result<JoinHandle<Result<u64>>> {
    let (url, name) = (format!("http://{}", from.address()), name.to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut stream = runtime.block_on(async {
        let mut client = ControlClient::connect(url).await?;
        let request = LogsRequest { name, follow: true, from_offset: 0 };
        anyhow::Ok(client.logs(request).await?.into_inner())
    })?;
    Ok(std::thread::spawn(move || {
        runtime.block_on(async {
            while let Some(chunk) = stream.message().await? {
                if !chunk.moved_to.is_empty() {
                    return Ok(chunk.offset);
                }
            }
            bail!("the log at the source ended without saying where it goes on")
        })
    }))
}

/// The time that `bytes` take over loopback TCP with one thread that writes
/// them, 1 MiB at a time, and one that reads them into fresh memory.
///
/// # Errors
/// When a socket fails.
pub fn plain_copy(bytes: usize) -> Result<Duration> {
    const PIECE: usize = 1 << 20;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let mut pattern: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut source = vec![0_u8; bytes];
    for word in source.chunks_mut(8) {
        pattern ^= pattern << 13;
        pattern ^= pattern >> 7;
        pattern ^= pattern << 17;
        word.copy_from_slice(&pattern.to_le_bytes()[..word.len()]);
    }
    let reader = std::thread::spawn(move || -> Result<Vec<u8>> {
        let (mut stream, _) = listener.accept()?;
        let mut memory = vec![0; bytes];
        stream.read_exact(&mut memory)?;
        stream.write_all(&[1])?;
        Ok(memory)
    });
    let mut stream = TcpStream::connect(address)?;
    let started = Instant::now();
    for piece in source.chunks(PIECE) {
        stream.write_all(piece)?;
    }
    stream.read_exact(&mut [0])?;
    let took = started.elapsed();
    let copy = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
    anyhow::ensure!(copy == source, "the copy differs");
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_copy_arrives_whole_also_when_it_ends_in_the_middle_of_a_piece() {
        assert!(plain_copy((3 << 20) + 12345).unwrap() > Duration::ZERO);
    }
}
