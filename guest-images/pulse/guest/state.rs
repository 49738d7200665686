//! What the vCPUs tell each other. Each counter has one writer; vCPU 0 reads and reports.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::settings::MAX_CPUS;

/// Counters of one vCPU, on a cache line of its own.
#[repr(align(64))]
pub struct Cpu {
    /// The start-up IPI arrived, and ring 3 was reached.
    pub up: AtomicBool,
    /// The hot region was filled.
    pub filled: AtomicBool,
    /// Completed passes.
    pub passes: AtomicU64,
    /// The last `VERIFY_ASKED` that was carried out.
    pub verified: AtomicU64,
    /// Times a clock was seen going backwards.
    pub backwards: AtomicU64,
    /// The last such time: which clock (see `clock`), from, to.
    pub backwards_last: [AtomicU64; 3],
}

/// One for each vCPU.
pub static CPUS: [Cpu; MAX_CPUS] = [const {
    Cpu {
        up: AtomicBool::new(false),
        filled: AtomicBool::new(false),
        passes: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        backwards: AtomicU64::new(0),
        backwards_last: [const { AtomicU64::new(0) }; 3],
    }
}; MAX_CPUS];

/// Counts the requests to verify everything at once.
pub static VERIFY_ASKED: AtomicU64 = AtomicU64::new(0);

/// The go-ahead for the passes: every region is filled.
pub static READY: AtomicBool = AtomicBool::new(false);

/// Words found wrong, by all vCPUs.
pub static ERRORS: AtomicU64 = AtomicU64::new(0);

static FIRST_CLAIMED: AtomicBool = AtomicBool::new(false);
static FIRST_KNOWN: AtomicBool = AtomicBool::new(false);
static FIRST: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

/// One wrong word.
pub struct Wrong {
    /// It is in a hot region.
    pub hot: bool,
    /// The vCPU that found it.
    pub cpu: usize,
    /// Its pass.
    pub pass: u64,
    /// Guest-physical address of the word.
    pub addr: u64,
    /// What it should hold.
    pub expected: u64,
    /// What it holds.
    pub found: u64,
}

/// Counts a wrong word and keeps the first.
#[cold]
pub fn report(wrong: &Wrong) {
    ERRORS.fetch_add(1, Relaxed);
    if FIRST_CLAIMED.swap(true, Relaxed) {
        return;
    }
    let fields = [
        u64::from(wrong.hot),
        wrong.cpu as u64,
        wrong.pass,
        wrong.addr,
        wrong.expected,
        wrong.found,
    ];
    for (slot, value) in FIRST.iter().zip(fields) {
        slot.store(value, Relaxed);
    }
    FIRST_KNOWN.store(true, core::sync::atomic::Ordering::Release);
}

/// The first wrong word, if there was one.
pub fn first_wrong() -> Option<Wrong> {
    if !FIRST_KNOWN.load(core::sync::atomic::Ordering::Acquire) {
        return None;
    }
    let [hot, cpu, pass, addr, expected, found] = FIRST.each_ref().map(|slot| slot.load(Relaxed));
    Some(Wrong { hot: hot != 0, cpu: cpu as usize, pass, addr, expected, found })
}
