//! pulse: a guest that fills memory, keeps rewriting it, and says when a byte is wrong.
//!
//! boot.s brings every vCPU to ring 3 and `run_vcpu`. vCPU 0 reads the boot information
//! (pvh, settings), lays out memory (plan, paging), starts the others (smp) and alone
//! speaks at COM1 (serial, console). Then each vCPU repeats its pass (memory) and looks at
//! its clocks (clock); what the others find reaches vCPU 0 through state.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod clock;
mod console;
mod intrinsics;
mod memory;
mod paging;
mod pattern;
mod plan;
mod port;
mod pvh;
mod serial;
mod settings;
mod smp;
mod state;

use core::fmt::Write as _;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use clock::{Clock, Reading};
use console::Console;
use memory::{FixedWalk, Viewer};
use plan::{Plan, Region};
use settings::Settings;
use state::CPUS;

core::arch::global_asm!(include_str!("boot.s"));

/// Written by vCPU 0 before it starts the others, read by all afterwards.
struct Published(core::cell::UnsafeCell<Option<(Settings, Plan)>>);
// SAFETY: the one write happens while vCPU 0 is alone.
unsafe impl Sync for Published {}
static PUBLISHED: Published = Published(core::cell::UnsafeCell::new(None));

/// Where boot.s arrives in ring 3, on every vCPU.
#[unsafe(no_mangle)]
extern "C" fn run_vcpu(cpu: usize, start_info: u64, kvmclock: u32) -> ! {
    let mut clock = Clock::new(cpu, kvmclock != 0);
    if cpu == 0 {
        let (settings, plan) = prepare(start_info, &clock);
        run_first(settings, plan, &mut clock)
    }
    CPUS[cpu].up.store(true, Release);
    // SAFETY: vCPU 0 published before it started this one, and nobody writes any more.
    let Some((settings, plan)) = (unsafe { &*PUBLISHED.0.get() }) else { stop("no plan") };
    run_other(cpu, settings, &plan.hot[cpu], &mut clock)
}

/// Everything until all vCPUs run and all memory is filled.
fn prepare(start_info: u64, clock: &Clock) -> (&'static Settings, &'static Plan) {
    serial::init();
    // SAFETY: `start_info` is EBX at the entry, and nothing was written outside the image.
    let boot = unsafe { pvh::Boot::read(start_info) }.unwrap_or_else(|what| stop(what));
    let settings = Settings::parse(boot.command_line()).unwrap_or_else(|bad| {
        say!("pulse error: {}= has a value that cannot be used", bad.0);
        port::power_off()
    });
    let ram = boot.ram();
    let plan = Plan::new(&settings, ram).unwrap_or_else(|misfit| {
        say!(
            "pulse error: static and hot regions and what is skipped need {} bytes, usable RAM is {}",
            misfit.wanted,
            misfit.usable
        );
        port::power_off()
    });
    if clock.hz() == 0 {
        stop("no kvmclock and no PIT: the TSC's rate cannot be known")
    }
    announce(&settings, &plan, clock);
    // SAFETY: vCPU 0 is alone, and runs this once.
    let (settings, plan) = unsafe {
        paging::map(&ram);
        let (settings, plan) = (*PUBLISHED.0.get()).insert((settings, plan));
        (&*settings, &*plan)
    };
    // SAFETY: alone, once; the loader's structures below 1 MiB were read to the end.
    if let Err(cpu) = unsafe { smp::start(settings.cpus, clock) } {
        say!("pulse error: vCPU {cpu} does not start");
        port::power_off()
    }
    memory::fill(&plan.fixed, settings.seed);
    memory::fill(&plan.hot[0], settings.seed);
    while CPUS[1..settings.cpus].iter().any(|cpu| !cpu.filled.load(Acquire)) {
        core::hint::spin_loop();
    }
    say!("pulse ready");
    state::READY.store(true, Release);
    (settings, plan)
}

fn announce(settings: &Settings, plan: &Plan, clock: &Clock) {
    let Settings { hot, fixed, check, rate, seed, cpus, skip: _ } = settings;
    say!(
        "pulse start hot={hot} static={fixed} check={check} rate={rate} seed={seed} cpus={cpus} kvmclock={} tsc_hz={}",
        clock.kind(),
        clock.hz()
    );
    announce_region("static", &plan.fixed);
    for region in &plan.hot[..*cpus] {
        announce_region("hot", region);
    }
}

fn announce_region(name: &str, region: &Region) {
    for piece in region.pieces() {
        say!("pulse plan {name} {:#x}..{:#x}", piece.start, piece.start + piece.len);
    }
}

fn run_first(settings: &Settings, plan: &Plan, clock: &mut Clock) -> ! {
    let mut console = Console::new();
    let mut walk = FixedWalk::new();
    let mut pace = Pace::new(settings.rate);
    let mut report = Report::default();
    let mut echoed_at = 0;
    loop {
        let viewer = pass(0, settings, &plan.hot[0]);
        walk.advance(&plan.fixed, settings.check, settings.seed, viewer);
        if verify_if_asked(0, settings, &plan.hot[0], viewer) {
            let whole = plan.fixed.len();
            FixedWalk::new().advance(&plan.fixed, whole, settings.seed, viewer);
        }
        let reading = clock.read();
        console.poll();
        console.start_of_line(&mut echoed_at);
        report.print(settings.cpus, viewer.pass, walk.rounds, &reading);
        pace.wait(clock, || console.poll());
    }
}

fn run_other(cpu: usize, settings: &Settings, hot: &Region, clock: &mut Clock) -> ! {
    memory::fill(hot, settings.seed);
    CPUS[cpu].filled.store(true, Release);
    while !state::READY.load(Acquire) {
        core::hint::spin_loop();
    }
    let mut pace = Pace::new(settings.rate);
    loop {
        let viewer = pass(cpu, settings, hot);
        verify_if_asked(cpu, settings, hot, viewer);
        clock.read();
        pace.wait(clock, || {});
    }
}

fn pass(cpu: usize, settings: &Settings, hot: &Region) -> Viewer {
    let viewer = Viewer { cpu, pass: CPUS[cpu].passes.load(Relaxed) + 1 };
    memory::rewrite(hot, settings.seed, viewer);
    CPUS[cpu].passes.store(viewer.pass, Relaxed);
    viewer
}

/// Verifies the whole hot region if that was asked for since the last time.
fn verify_if_asked(cpu: usize, settings: &Settings, hot: &Region, viewer: Viewer) -> bool {
    let asked = state::VERIFY_ASKED.load(Relaxed);
    let due = CPUS[cpu].verified.load(Relaxed) != asked;
    if due {
        memory::verify_hot(hot, settings.seed, viewer);
        CPUS[cpu].verified.store(asked, Release);
    }
    due
}

/// Spaces passes by the TSC.
struct Pace {
    rate: u64,
    due: u64,
}

impl Pace {
    fn new(rate: u64) -> Self {
        Self { rate, due: clock::tsc() }
    }

    /// Waits for the next pass, calling `idle` about every millisecond. After a delay the
    /// passes missed are not made up for.
    fn wait(&mut self, clock: &Clock, mut idle: impl FnMut()) {
        if self.rate == 0 {
            return;
        }
        let hz = clock.hz();
        let period = hz / self.rate;
        let now = clock::tsc();
        // The counter may jump either way when the machine moves: never wait longer than
        // one period from now.
        self.due = (self.due + period).clamp(now, now + period);
        let mut look = now + hz / 1000;
        loop {
            let now = clock::tsc();
            if now >= self.due || self.due - now > period {
                return;
            }
            if now >= look {
                idle();
                look = now + hz / 1000;
            }
            core::hint::spin_loop();
        }
    }
}

/// The heartbeat, and the lines that go with it.
#[derive(Default)]
struct Report {
    backwards_told: [u64; settings::MAX_CPUS],
    verify_told: u64,
}

impl Report {
    fn print(&mut self, cpus: usize, pass: u64, rounds: u64, reading: &Reading) {
        let mut line = serial::Line::new();
        // A line cuts off rather than fails, here and below.
        let _ = write!(line, "pulse pass={pass} tsc={} kvmclock_ns=", reading.tsc);
        let _ = match reading.ns {
            Some(ns) => write!(line, "{ns} cpus={cpus} passes="),
            None => write!(line, "none cpus={cpus} passes="),
        };
        let mut backwards = 0;
        for (i, cpu) in CPUS[..cpus].iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ = write!(line, "{comma}{}", cpu.passes.load(Relaxed));
            backwards += cpu.backwards.load(Relaxed);
        }
        let errors = state::ERRORS.load(Relaxed);
        let _ = write!(line, " static_rounds={rounds} errors={errors} back={backwards}");
        line.send();
        if let Some(wrong) = state::first_wrong() {
            say!(
                "WRONG region={} cpu={} pass={} addr={:#x} expected={:#018x} found={:#018x}",
                if wrong.hot { "hot" } else { "static" },
                wrong.cpu,
                wrong.pass,
                wrong.addr,
                wrong.expected,
                wrong.found
            );
        }
        self.tell_backwards(cpus);
        self.tell_verified(cpus, errors);
    }

    fn tell_backwards(&mut self, cpus: usize) {
        for (i, (cpu, told)) in CPUS[..cpus].iter().zip(&mut self.backwards_told).enumerate() {
            let count = cpu.backwards.load(Acquire);
            if count != *told {
                *told = count;
                let [clock, from, to] = cpu.backwards_last.each_ref().map(|v| v.load(Acquire));
                say!("TIME BACKWARDS clock={} cpu={i} from={from} to={to}", clock::name(clock));
            }
        }
    }

    fn tell_verified(&mut self, cpus: usize, errors: u64) {
        let asked = state::VERIFY_ASKED.load(Relaxed);
        let done = CPUS[..cpus].iter().all(|cpu| cpu.verified.load(Acquire) == asked);
        if done && self.verify_told != asked {
            self.verify_told = asked;
            say!("pulse verified all errors={errors}");
        }
    }
}

/// Ends the machine with a reason.
fn stop(what: &str) -> ! {
    say!("pulse error: {what}");
    port::power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    say!("pulse error: {info}");
    port::power_off()
}
