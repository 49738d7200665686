//! What runs inside a host from its start on and does what it is told over the
//! command channels, which need no network.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;

use super::layout::CHANNELS;
use super::protocol::{self, Data, MAX_DATA, Order, Reply, Request};
use super::still_vm::StillVm;

/// How long to wait before looking again whether somebody has connected.
const PAUSE: Duration = Duration::from_millis(20);
/// How long nobody must be connected for a program that runs in the foreground to be
/// killed.
const ALONE: Duration = Duration::from_secs(2);

/// Serves every channel for ever.
///
/// # Errors
/// When this is not a lab host.
pub fn serve() -> Result<()> {
    // Before the first guest, and for as long as the host lives.
    let _still = StillVm::new()?;
    switch_on_cpus()?;
    let mut threads = Vec::new();
    for channel in 0..CHANNELS {
        let device = device(&format!("lab.{channel}"))?;
        let port = OpenOptions::new().read(true).write(true).open(&device);
        let port = port.with_context(|| format!("open {}", device.display()))?;
        threads.push(std::thread::spawn(move || serve_port(port)));
    }
    println!("lab: the agent serves");
    for thread in threads {
        // A thread that panics leaves its channel dead; the others go on.
        let _ = thread.join();
    }
    Ok(())
}

/// Switches on the CPUs that an emulated host was started without: making the
/// VM that never runs patches the kernel, too, which is safe as long as no other
/// CPU runs it.
fn switch_on_cpus() -> Result<()> {
    for entry in fs::read_dir("/sys/devices/system/cpu").context("list the CPUs")? {
        let online = entry?.path().join("online");
        // Not every entry is a CPU, and the first CPU can't be switched.
        if fs::read_to_string(&online).is_ok_and(|state| state.trim() == "0") {
            fs::write(&online, "1").with_context(|| format!("write {}", online.display()))?;
        }
    }
    Ok(())
}

/// The device of the virtio-serial port of that name.
fn device(name: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("list the channels")? {
        let entry = entry?;
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim() == name {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    anyhow::bail!("no virtio-serial port has the name {name}: this is not a lab host")
}

/// Where replies go. Those of a session that is over are dropped.
#[derive(Debug)]
struct Session {
    number: u64,
    port: File,
}

type Shared = Arc<Mutex<Session>>;

fn reply(session: &Shared, of: u64, reply: &Reply) -> Result<()> {
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    if session.number == of {
        protocol::send(&mut session.port, reply)?;
    }
    Ok(())
}

/// The program of a session that runs in the foreground.
#[derive(Debug)]
struct Job {
    group: Pid,
    input: Option<ChildStdin>,
}

impl Job {
    fn kill(self) {
        // It may have ended by itself.
        let _ = killpg(self.group, Signal::SIGKILL);
    }
}

fn serve_port(port: File) -> Result<()> {
    let session: Shared = Arc::new(Mutex::new(Session { number: 0, port: port.try_clone()? }));
    let mut input = BufReader::new(port);
    let mut job: Option<Job> = None;
    let mut alone: Option<Instant> = None;
    loop {
        // At the end of the stream nobody is connected any more, or yet. What
        // is no request is the torn end of a session.
        let asked = Instant::now();
        let Ok(Some(request)) = protocol::receive(&mut input, true) else {
            // That the session before was closed may be heard only when the next one
            // has begun: the kernel is told so beside the stream. Then there is more to
            // read at once, or a wait for it.
            let since = match alone {
                Some(since) if asked.elapsed() < ALONE / 4 => since,
                _ => *alone.insert(Instant::now()),
            };
            if since.elapsed() > ALONE
                && let Some(job) = job.take()
            {
                job.kill();
            }
            std::thread::sleep(PAUSE);
            continue;
        };
        alone = None;
        let number = session.lock().unwrap_or_else(PoisonError::into_inner).number;
        match request {
            Request::Hello { nonce } => {
                if let Some(job) = job.take() {
                    job.kill();
                }
                let next = number + 1;
                session.lock().unwrap_or_else(PoisonError::into_inner).number = next;
                reply(&session, next, &Reply::Hello { nonce })?;
            }
            Request::Run { order } => match run(&order, &session, number) {
                Ok(started) => job = Some(started),
                Err(error) => refuse(&session, number, &error)?,
            },
            Request::Input { data } => {
                let pipe = job.as_mut().and_then(|job| job.input.as_mut());
                // A program need not read all that it is given.
                let _ = pipe.map(|pipe| pipe.write_all(&data.0));
            }
            Request::InputEnds => {
                if let Some(job) = &mut job {
                    job.input = None;
                }
            }
            Request::Spawn { order, log } => match spawn(&order, &log) {
                Ok(pid) => reply(&session, number, &Reply::Spawned { pid })?,
                Err(error) => refuse(&session, number, &error)?,
            },
            Request::SetClock { unix_ns } => match set_clock(unix_ns) {
                Ok(()) => reply(&session, number, &Reply::Done)?,
                Err(error) => refuse(&session, number, &error)?,
            },
        }
    }
}

fn refuse(session: &Shared, number: u64, error: &anyhow::Error) -> Result<()> {
    reply(session, number, &Reply::Failed { message: format!("{error:#}") })
}

fn command(order: &Order) -> Result<Command> {
    let (program, arguments) = order.words.split_first().context("no program is named")?;
    let mut command = Command::new(program);
    command.args(arguments).envs(order.environment.iter().cloned()).current_dir("/");
    Ok(command)
}

fn run(order: &Order, session: &Shared, number: u64) -> Result<Job> {
    let mut command = command(order)?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.process_group(0).spawn().with_context(|| starting(order))?;
    let group = Pid::from_raw(i32::try_from(child.id())?);
    let input = child.stdin.take();
    let pumps = [
        child.stdout.take().map(|pipe| pump(pipe, false, session, number)),
        child.stderr.take().map(|pipe| pump(pipe, true, session, number)),
    ];
    let session = Arc::clone(session);
    std::thread::spawn(move || -> Result<()> {
        let status = child.wait()?.code().unwrap_or(-1);
        for pump in pumps.into_iter().flatten() {
            // All output goes before the end does.
            let _ = pump.join();
        }
        reply(&session, number, &Reply::Exited { status })
    });
    Ok(Job { group, input })
}

fn starting(order: &Order) -> String {
    format!("start {}", order.words.join(" "))
}

fn pump(
    mut pipe: impl Read + Send + 'static,
    error: bool,
    session: &Shared,
    number: u64,
) -> std::thread::JoinHandle<Result<()>> {
    let session = Arc::clone(session);
    std::thread::spawn(move || {
        let mut buffer = vec![0; MAX_DATA];
        loop {
            let read = pipe.read(&mut buffer)?;
            let Some(data) = buffer.get(..read).filter(|data| !data.is_empty()) else {
                return Ok(());
            };
            let data = Data(data.to_vec());
            reply(&session, number, &Reply::Output { error, data })?;
        }
    })
}

/// Starts a program in a group of its own and says in its log how it ended.
fn spawn(order: &Order, log: &str) -> Result<u32> {
    let log = OpenOptions::new().create(true).append(true).open(log);
    let log = log.context("open the program's log")?;
    let mut command = command(order)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let child = command.process_group(0).spawn().with_context(|| starting(order))?;
    let pid = child.id();
    std::thread::spawn(move || note_end(child, log));
    Ok(pid)
}

fn note_end(mut child: Child, mut log: File) -> Result<()> {
    let status = child.wait()?;
    // A program that ends well says so itself.
    if let Some(signal) = status.signal() {
        writeln!(log, "lab: process {} was ended by signal {signal}", child.id())?;
    }
    Ok(())
}

fn set_clock(unix_ns: i64) -> Result<()> {
    let time = TimeSpec::new(unix_ns / 1_000_000_000, unix_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).context("set the clock")
}
