//! Which mode a process tree or a container moves in, by real CRIU, and what is said of
//! it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use integration::host_pair::{HostPair, migrate};
use integration::process::container::{self, Bundle};
use integration::process::{self, Counter, PYTHON, start, wait_for_line};
use serde_json::Value;

/// Whether the kernel tells which pages a process writes to (bit 55 of an entry of
/// `/proc/PID/pagemap`, cleared by `4` in `/proc/PID/clear_refs`; proc(5)).
fn kernel_tracks_memory() -> Result<bool> {
    let mut page = vec![0_u8; 3 << 12];
    let written = &raw mut page[1 << 12];
    fs::write("/proc/self/clear_refs", "4")?;
    page[1 << 12] = 7;
    let mut entry = [0; 8];
    let at = u64::try_from(written.addr() >> 12)? * 8;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
    ensure!(page[1 << 12] == 7);
    Ok(u64::from_ne_bytes(entry) & (1 << 55) != 0)
}

fn reason(said: &Value) -> &str {
    said["mode_reason"].as_str().unwrap_or_default()
}

#[test]
fn precopy_works_where_the_kernel_tracks_memory_and_is_refused_by_name_elsewhere() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    goes_ahead_or_says_why_not(&pair, &counter)?;
    pair.finish(counter.name)
}

/// Has it moved with precopy, if the kernel lets it.
fn goes_ahead_or_says_why_not(pair: &HostPair, counter: &Counter) -> Result<()> {
    let tracks = kernel_tracks_memory()?;
    for options in [&["--mode", "precopy", "--dry-run"][..], &["--mode", "precopy"]] {
        let said = migrate(&pair.a, &pair.b, counter.name, options)?;
        if tracks {
            let report = said.ok()?.json()?;
            ensure!(report["mode"] == "precopy", "{report}");
            ensure!(reason(&report) == "it was asked for", "{report}");
            let rounds = report["rounds"].as_array().map_or(0, Vec::len);
            ensure!(rounds >= 1 || options.len() == 3, "{report}");
        } else {
            ensure!(said.status == 3, "{}: {}", said.command, said.stderr);
            for words in ["mode precopy", "does not track", "use --mode stop"] {
                ensure!(said.stderr.contains(words), "no {words:?} in {}", said.stderr);
            }
        }
    }
    let home = if tracks { &pair.b } else { &pair.a };
    counter.counts(home, 5)?;
    Ok(())
}

#[test]
fn precopy_of_a_container_works_where_that_of_a_tree_does() -> Result<()> {
    let pair = process::hosts()?;
    Bundle::make(pair.directory())?.run(&pair.a, &[])?;
    goes_ahead_or_says_why_not(&pair, &container::counter())?;
    pair.finish(container::NAME)
}

#[test]
fn without_an_order_a_small_tree_is_stopped_and_plan_and_report_say_why() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    is_stopped_and_says_why(&pair, &counter)?;
    pair.finish(counter.name)
}

#[test]
fn without_an_order_a_small_container_is_stopped_and_plan_and_report_say_why() -> Result<()> {
    let pair = process::hosts()?;
    Bundle::make(pair.directory())?.run(&pair.a, &[])?;
    is_stopped_and_says_why(&pair, &container::counter())?;
    container::is_whole(&pair.b)?;
    pair.finish(container::NAME)
}

/// Has it moved as migr likes.
fn is_stopped_and_says_why(pair: &HostPair, counter: &Counter) -> Result<()> {
    let why = if kernel_tracks_memory()? { "a stop takes no longer" } else { "does not track" };
    let plan = migrate(&pair.a, &pair.b, counter.name, &["--dry-run"])?.ok()?.json()?;
    let report = migrate(&pair.a, &pair.b, counter.name, &[])?.ok()?.json()?;
    for said in [&plan, &report] {
        ensure!(said["mode"] == "stop" && reason(said).contains(why), "{said}");
    }
    ensure!(plan["max_downtime_ms"] == 0.0, "a limit that nobody set: {plan}");
    ensure!(report["rounds"] == serde_json::json!([]), "{report}");
    counter.counts(&pair.b, 5)?;
    Ok(())
}

#[test]
fn a_large_tree_goes_ahead_where_the_kernel_tracks_memory() -> Result<()> {
    let pair = process::hosts()?;
    let program = "import mmap, sys, time\n\
                   private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS\n\
                   held = mmap.mmap(-1, 96 << 20, flags=private)\n\
                   held[:] = b'x' * (96 << 20)\n\
                   print('ready', flush=True)\n\
                   sys.stdin.readline()\n\
                   print('whole', held[:] == b'x' * (96 << 20), flush=True)\n\
                   time.sleep(1000)";
    start(&pair.a, "large", &[PYTHON, "-c", program])?;
    wait_for_line(&pair.a, "large", "ready")?;
    let tracks = kernel_tracks_memory()?;
    let report = migrate(&pair.a, &pair.b, "large", &["--verify"])?.ok()?.json()?;
    let (mode, why) =
        if tracks { ("precopy", "private memory can be sent") } else { ("stop", "does not track") };
    ensure!(report["mode"] == mode && reason(&report).contains(why), "{report}");
    ensure!(report["verified"] == true, "{report}");
    let rounds = report["rounds"].as_array().context("no rounds")?;
    ensure!(rounds.is_empty() != tracks, "{report}");
    process::type_line(&pair.b, "large", "compare")?;
    wait_for_line(&pair.b, "large", "whole True")?;
    pair.finish("large")
}

#[test]
fn a_paused_tree_is_not_sent_ahead() -> Result<()> {
    let pair = process::hosts()?;
    let counter = Counter::small();
    counter.run(&pair.a)?;
    pair.a.migctl(&["pause", counter.name])?.ok()?;
    let refused = migrate(&pair.a, &pair.b, counter.name, &["--mode", "precopy"])?;
    ensure!(refused.status == 3 && refused.stderr.contains("it is paused"), "{}", refused.stderr);
    let report = migrate(&pair.a, &pair.b, counter.name, &[])?.ok()?.json()?;
    ensure!(report["mode"] == "stop" && reason(&report).contains("paused"), "{report}");
    pair.b.migctl(&["resume", counter.name])?.ok()?;
    counter.counts(&pair.b, 5)?;
    pair.finish(counter.name)
}
