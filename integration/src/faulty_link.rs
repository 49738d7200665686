//! A TCP proxy before a daemon that spoils what passes, at an exact place.
//!
//! Places are counted in bytes toward the daemon, over all connections since
//! the proxy was made. Bytes back to the client pass unharmed until the link
//! is cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;

use crate::daemon::free_address;

/// What happens to the bytes toward the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// All connections break after that many bytes, and new ones are refused.
    CutAfter(u64),
    /// Nothing goes on after that many bytes, in either direction; connections
    /// stay open.
    StallAfter(u64),
    /// The byte with that number arrives changed.
    CorruptAt(u64),
    /// That many bytes never arrive, from that number on; what follows does.
    Drop {
        /// The first byte that is missing.
        at: u64,
        /// How many are missing.
        count: u64,
    },
    /// Every piece arrives that much later.
    Delay(Duration),
}

/// The proxy. Dropping it breaks its connections.
#[derive(Debug)]
pub struct FaultyLink {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    fault: Mutex<Fault>,
    passed: AtomicU64,
    hit: AtomicBool,
    closed: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl FaultyLink {
    /// A link to the daemon at `to`.
    ///
    /// # Errors
    /// When no address is free.
    pub fn to(to: SocketAddr, fault: Fault) -> Result<Self> {
        let listener = TcpListener::bind(free_address()?)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            to,
            fault: Mutex::new(fault),
            passed: AtomicU64::new(0),
            hit: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let accepting = shared.clone();
        let acceptor = std::thread::spawn(move || accepting.accept(&listener));
        Ok(Self { address, shared, acceptor: Some(acceptor) })
    }

    /// Where to connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that went toward the daemon so far.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::SeqCst)
    }

    /// Whether the place of the fault was reached.
    #[must_use]
    pub fn hit(&self) -> bool {
        self.shared.hit.load(Ordering::SeqCst)
    }

    /// Puts another fault in place, from now on.
    pub fn set(&self, fault: Fault) {
        *lock(&self.shared.fault) = fault;
    }

    /// Breaks every connection; new ones are refused.
    pub fn cut(&self) {
        self.shared.cut();
    }
}

impl Drop for FaultyLink {
    fn drop(&mut self) {
        self.shared.cut();
        // Wakes the acceptor, which then sees that it is over.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            // A panic of it was printed already.
            let _ = acceptor.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn cut(&self) {
        self.closed.store(true, Ordering::SeqCst);
        for stream in lock(&self.open).drain(..) {
            // Closed by the other end is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for client in listener.incoming().flatten() {
            if self.closed.load(Ordering::SeqCst) {
                return;
            }
            let Ok(server) = TcpStream::connect(self.to) else { continue };
            if let Err(error) = self.join(client, server) {
                eprintln!("faulty link: {error}");
            }
        }
    }

    fn join(self: &Arc<Self>, client: TcpStream, server: TcpStream) -> Result<()> {
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        lock(&self.open).extend([client.try_clone()?, server.try_clone()?]);
        let (back_from, back_to) = (server.try_clone()?, client.try_clone()?);
        let (there, back) = (self.clone(), self.clone());
        std::thread::spawn(move || there.pump(client, server, true));
        std::thread::spawn(move || back.pump(back_from, back_to, false));
        Ok(())
    }

    /// Carries bytes until either end closes.
    fn pump(&self, mut from: TcpStream, mut to: TcpStream, there: bool) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let mut bytes = buffer[..count].to_vec();
            if there && !self.spoil(&mut bytes) {
                break;
            }
            while !there && self.stalled() {
                std::thread::sleep(Duration::from_millis(5));
            }
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        // The other end may have closed it first.
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    fn stalled(&self) -> bool {
        let stalls = matches!(*lock(&self.fault), Fault::StallAfter(_));
        stalls && self.hit.load(Ordering::SeqCst) && !self.closed.load(Ordering::SeqCst)
    }

    /// Does to `bytes` what is due; false when the connection is over.
    fn spoil(&self, bytes: &mut Vec<u8>) -> bool {
        let length = bytes.len() as u64;
        let first = self.passed.fetch_add(length, Ordering::SeqCst);
        let end = first + length;
        let fault = *lock(&self.fault);
        match fault {
            Fault::None => {}
            Fault::Delay(time) => std::thread::sleep(time),
            Fault::CutAfter(place) if end > place => {
                self.hit.store(true, Ordering::SeqCst);
                self.cut();
                return false;
            }
            Fault::StallAfter(place) if end > place => {
                self.hit.store(true, Ordering::SeqCst);
                while self.stalled() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                return !self.closed.load(Ordering::SeqCst);
            }
            Fault::CorruptAt(place) if (first..end).contains(&place) => {
                self.hit.store(true, Ordering::SeqCst);
                let index = usize::try_from(place - first).unwrap_or_default();
                bytes[index] ^= 0x20;
            }
            Fault::Drop { at, count } if first < at + count && end > at => {
                self.hit.store(true, Ordering::SeqCst);
                let mut place = first;
                bytes.retain(|_| {
                    place += 1;
                    !(at..at + count).contains(&(place - 1))
                });
            }
            Fault::CutAfter(_)
            | Fault::StallAfter(_)
            | Fault::CorruptAt(_)
            | Fault::Drop { .. } => {}
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What arrives of `0..200` sent through a link with that fault.
    fn through(fault: Fault) -> Vec<u8> {
        let target = TcpListener::bind(free_address().unwrap()).unwrap();
        let link = FaultyLink::to(target.local_addr().unwrap(), fault).unwrap();
        let mut client = TcpStream::connect(link.address()).unwrap();
        let (mut server, _) = target.accept().unwrap();
        client.write_all(&(0..200).collect::<Vec<u8>>()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut arrived = Vec::new();
        // A connection that is cut ends the reading like one that is closed.
        let _ = server.read_to_end(&mut arrived);
        assert_eq!(link.hit(), fault != Fault::None);
        arrived
    }

    #[test]
    fn a_sound_link_changes_nothing() {
        assert_eq!(through(Fault::None), (0..200).collect::<Vec<u8>>());
    }

    #[test]
    fn one_byte_is_corrupted_and_no_other() {
        let mut expected: Vec<u8> = (0..200).collect();
        expected[77] ^= 0x20;
        assert_eq!(through(Fault::CorruptAt(77)), expected);
    }

    #[test]
    fn a_gap_is_exactly_as_long_as_asked() {
        let expected: Vec<u8> = (0..50).chain(60..200).collect();
        assert_eq!(through(Fault::Drop { at: 50, count: 10 }), expected);
    }

    #[test]
    fn nothing_arrives_after_a_cut() {
        assert!(through(Fault::CutAfter(100)).is_empty());
    }
}
