//! Timers that CRIU leaves disarmed.
//!
//! A periodic timerfd that expires while its tree stands still has nothing left until
//! its next expiry: the kernel starts it anew only when it is read. CRIU 4.2 writes
//! that down and sets it as it was, and a time of zero disarms a timer
//! (`timerfd_settime(2)`): it would never expire again.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::Duration;

use crate::sys::process::PidFd;
use crate::sys::timers;

/// Starts such timers of these processes, none of which runs.
///
/// # Errors
/// When one can't be started.
pub fn start_again(processes: &[u32]) -> io::Result<()> {
    for pid in processes {
        // A helper of CRIU's may be gone already.
        let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for fd in fds.flatten() {
            let link = fs::read_link(fd.path()).unwrap_or_default();
            if link != Path::new("anon_inode:[timerfd]") {
                continue;
            }
            let number = fd.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
            let Some(number) = number else { continue };
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
            if let Some(interval) = stuck(&info) {
                timers::start(&PidFd::open(*pid)?, number, interval)?;
            }
        }
    }
    Ok(())
}

/// The interval of a timer that has expired, is periodic, and has no next expiry; from
/// its `/proc/PID/fdinfo` (proc(5)). One that its program disarmed has no ticks.
fn stuck(info: &str) -> Option<Duration> {
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let time = |name: &str| {
        let (seconds, nanos) =
            field(name)?.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
        Some(Duration::new(seconds.parse().ok()?, nanos.parse().ok()?))
    };
    let ticks: u64 = field("ticks:")?.parse().ok()?;
    let interval = time("it_interval:")?;
    let is = ticks > 0 && time("it_value:")?.is_zero() && !interval.is_zero();
    is.then_some(interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_has_expired_and_has_no_next_expiry_is_stuck() {
        let info = |ticks: u32, value: &str, interval: &str| {
            format!(
                "pos:\t0\nflags:\t02\nclockid: 1\nticks: {ticks}\nsettime flags: 00\n\
                 it_value: {value}\nit_interval: {interval}\n"
            )
        };
        let period = Some(Duration::from_millis(20));
        assert_eq!(stuck(&info(1, "(0, 0)", "(0, 20000000)")), period);
        assert_eq!(stuck(&info(0, "(0, 0)", "(0, 20000000)")), None, "disarmed");
        assert_eq!(stuck(&info(1, "(0, 5)", "(0, 20000000)")), None, "it goes on");
        assert_eq!(stuck(&info(1, "(0, 0)", "(0, 0)")), None, "one shot");
        assert_eq!(stuck("pos:\t0\n"), None);
    }
}
