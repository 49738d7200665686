//! A client of HTTP/1.1 that keeps its connection, and one that is in the middle of a
//! download.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use integration::wait;

/// Size of the file that is downloaded, in bytes.
pub const FILE_BYTES: u64 = 256 << 20;
/// How much of it a client takes around each move, in bytes.
const AROUND_A_MOVE: u64 = 16 << 20;
const PIECE: usize = 256 << 10;
/// Between two pieces, so that a move falls into the middle of many.
const PAUSE: Duration = Duration::from_millis(10);

pub struct Connection(BufReader<TcpStream>);

impl Connection {
    pub fn new(stream: TcpStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// Asks for `path`; how many bytes the answer has, which come now.
    fn request(&mut self, method: &str, path: &str, body: &[u8]) -> Result<u64> {
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: migr\r\nContent-Length: {length}\r\n\r\n");
        self.0.get_mut().write_all(&[head.as_bytes(), body].concat())?;
        let status = self.line()?;
        ensure!(status.contains(" 200 "), "{method} {path}: {status}");
        let mut length = None;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                return length.with_context(|| format!("{method} {path}: no length"));
            }
            ensure!(line != "connection: close", "it wants to end the connection");
            if let Some(value) = line.strip_prefix("content-length:") {
                length = Some(value.trim().parse()?);
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line.strip_suffix("\r\n").context("the connection ended")?.to_owned())
    }

    /// The answer to one request.
    pub fn ask(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>> {
        let length = self.request(method, path, body)?;
        let mut answer = vec![0; usize::try_from(length)?];
        self.0.read_exact(&mut answer)?;
        Ok(answer)
    }
}

/// Writes a file whose bytes say where they are.
pub fn write_file(path: &Path) -> Result<()> {
    let mut file = std::io::BufWriter::with_capacity(PIECE, File::create(path)?);
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..FILE_BYTES / 8 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        file.write_all(&word.to_le_bytes())?;
    }
    Ok(file.flush()?)
}

/// A download that goes on while its server moves. Every byte is compared.
pub struct Download {
    allowed: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    thread: JoinHandle<Result<Connection>>,
}

impl Download {
    /// Begins to take `path`, which is the file `original`.
    pub fn start(mut connection: Connection, path: &'static str, original: &Path) -> Result<Self> {
        let original = File::open(original)?;
        let (allowed, received) = (Arc::new(AtomicU64::new(AROUND_A_MOVE)), Arc::default());
        let (limit, count): (Arc<AtomicU64>, Arc<AtomicU64>) =
            (Arc::clone(&allowed), Arc::clone(&received));
        let thread = std::thread::spawn(move || {
            let length = connection.request("GET", path, b"")?;
            ensure!(length == FILE_BYTES, "{path} has {length} bytes");
            take(&mut connection, &original, &limit, &count)?;
            Ok(connection)
        });
        Ok(Self { allowed, received, thread })
    }

    /// Some of it has arrived since the last time, and some is still to come.
    pub fn goes_on(&self) -> Result<()> {
        let allowed = self.allowed.load(Ordering::Acquire);
        ensure!(allowed < FILE_BYTES, "the file is too small for so many moves");
        wait::until("a download to go on", || {
            ensure!(!self.thread.is_finished(), "the client has given up");
            Ok((self.received.load(Ordering::Acquire) == allowed).then_some(()))
        })?;
        self.allowed.fetch_add(AROUND_A_MOVE, Ordering::AcqRel);
        Ok(())
    }

    /// Takes the rest; its connection, which can be asked again.
    pub fn finish(self) -> Result<Connection> {
        self.allowed.store(FILE_BYTES, Ordering::Release);
        self.thread.join().map_err(|_| anyhow!("the client panicked"))?
    }
}

fn take(
    connection: &mut Connection,
    original: &File,
    allowed: &AtomicU64,
    received: &AtomicU64,
) -> Result<()> {
    let (mut piece, mut expected) = (vec![0; PIECE], vec![0; PIECE]);
    let mut at = 0;
    while at < FILE_BYTES {
        let left = allowed.load(Ordering::Acquire) - at;
        if left == 0 {
            std::thread::sleep(PAUSE);
            continue;
        }
        let most = usize::try_from(left)?.min(PIECE);
        connection.0.read_exact(&mut piece[..most])?;
        original.read_exact_at(&mut expected[..most], at)?;
        ensure!(piece[..most] == expected[..most], "the bytes from {at} on are others");
        at += most as u64;
        received.store(at, Ordering::Release);
        if at < FILE_BYTES && allowed.load(Ordering::Acquire) < FILE_BYTES {
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}
