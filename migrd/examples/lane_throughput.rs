//! How fast the lanes are on this machine, next to a plain TCP copy of the
//! same bytes: `cargo run --release -p migrd --example lane_throughput [MiB]`.

use std::error::Error;
use std::io::{Read, Write};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use migrd::migration::link::PageLanes;
use migrd::units::{MigrationId, PAGE_SIZE, PageIndex, PageRun};
use migrd::wire::receive::{LaneDirectory, LaneService, Receiver};
use migrd::wire::send::SendLanes;
use migrd::wire::{incoming, server_settings};
use migrd::workload::{ChunkSink, ChunkSource, OutOfStream, StreamKey, StreamSpec};
use tokio::net::TcpListener;
use tonic::transport::{Endpoint, Server};

const KEY: StreamKey = StreamKey(0);
const PIECE: usize = 1 << 20;
const ROUNDS: usize = 3;

/// One stream, in pieces of 1 MiB so that lanes do not wait for each other.
struct Memory(Vec<RwLock<Vec<u8>>>);

impl Memory {
    fn new(mib: usize, seed: u64) -> Self {
        let mut state = seed;
        let mut piece = || {
            let mut bytes = vec![0; PIECE];
            for byte in bytes.iter_mut().filter(|_| seed != 0) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = state.to_be_bytes()[0];
            }
            RwLock::new(bytes)
        };
        Self((0..mib).map(|_| piece()).collect())
    }

    /// The piece and the place in it, for an access that stays within a piece.
    fn at(&self, offset: u64, length: usize) -> Option<(&RwLock<Vec<u8>>, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let within = offset % PIECE;
        (within + length <= PIECE).then_some((self.0.get(offset / PIECE)?, within))
    }

    fn refuse(key: StreamKey, offset: u64, length: usize) -> OutOfStream {
        OutOfStream { key, offset, length: length as u64 }
    }
}

impl ChunkSource for Memory {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        let refused = Self::refuse(key, offset, into.len());
        let (piece, at) = self.at(offset, into.len()).ok_or(refused)?;
        into.copy_from_slice(&piece.read().expect("not poisoned")[at..at + into.len()]);
        Ok(())
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (piece, at) = self.at(offset, length).ok_or(Self::refuse(key, offset, length))?;
        let piece = piece.read().expect("not poisoned");
        Ok(piece[at..at + length].iter().all(|byte| *byte == 0))
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

impl ChunkSink for Memory {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let (mut offset, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            let room = PIECE - usize::try_from(offset % PIECE as u64).expect("in a piece");
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            let refused = Self::refuse(key, offset, now.len());
            let (piece, at) = self.at(offset, now.len()).ok_or(refused)?;
            piece.write().expect("not poisoned")[at..at + now.len()].copy_from_slice(now);
            offset += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        self.write(key, offset, &vec![0; length])
    }
}

fn plain_tcp(from: &Memory, to: &Memory) -> Result<f64, Box<dyn Error>> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            to.0.iter().try_for_each(|p| stream.read_exact(&mut p.write().expect("not poisoned")))
        });
        let mut stream = std::net::TcpStream::connect(address)?;
        for piece in &from.0 {
            stream.write_all(&piece.read().expect("not poisoned"))?;
        }
        reader.join().expect("the reader does not panic")
    })?;
    Ok(began.elapsed().as_secs_f64())
}

async fn lanes(from: &Arc<Memory>, to: &Arc<Memory>, count: usize) -> Result<f64, Box<dyn Error>> {
    let length = from.0.len() as u64 * PIECE as u64;
    let spec = StreamSpec { key: KEY, name: "bytes".into(), length, used: 0 };
    let receiver = Arc::new(Receiver::new(&[spec], Arc::clone(to) as _, count));
    let (directory, migration) = (LaneDirectory::default(), MigrationId::random());
    assert!(directory.insert(migration, receiver), "a new migration");
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = Endpoint::from_shared(format!("http://{}", listener.local_addr()?))?;
    let server = server_settings(Server::builder())
        .add_service(LaneService::new(directory))
        .serve_with_incoming(incoming(listener));
    let server = tokio::spawn(server);
    let mut link = SendLanes::connect(endpoint, migration, count, Arc::clone(from) as _).await?;
    let began = Instant::now();
    link.send(KEY, PageRun { first: PageIndex(0), count: length / PAGE_SIZE }).await?;
    Box::new(link).close().await?;
    let took = began.elapsed().as_secs_f64();
    server.abort();
    Ok(took)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mib: usize = std::env::args().nth(1).map_or(Ok(512), |arg| arg.parse())?;
    let from = Arc::new(Memory::new(mib, 42));
    let to = Arc::new(Memory::new(mib, 0));
    let size = f64::from(u32::try_from(mib)?);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Touches the destination's memory, so that nobody pays for its first use.
    to.0.iter().for_each(|piece| piece.write().expect("not poisoned").fill(1));
    for round in 1..=ROUNDS {
        let plain = size / plain_tcp(&from, &to)?;
        println!("round {round}: plain TCP {plain:.0} MiB/s");
        for count in [1, 2, 4] {
            to.0.iter().for_each(|piece| piece.write().expect("not poisoned").fill(0));
            let rate = size / runtime.block_on(lanes(&from, &to, count))?;
            let same =
                from.0.iter().zip(&to.0).all(|(a, b)| {
                    *a.read().expect("not poisoned") == *b.read().expect("not poisoned")
                });
            assert!(same, "what arrived is not what was sent");
            println!("  {count} lanes {rate:.0} MiB/s, {:.2} of plain TCP", rate / plain);
        }
    }
    Ok(())
}
