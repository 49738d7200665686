//! A VM moves between two daemons, on real KVM, and the guest does not notice.

use anyhow::{Context, Result, ensure};
use integration::host_pair::HostPair;
use integration::scenario::{self, Pulse, converse, expect_alive, heartbeats, wait_for_pass};
use integration::wait;

fn there_and_back(cpus: u32) -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small().cpus(cpus);
    pulse.run(&pair, &pair.a)?;

    let there = pair.there(pulse.name, &["--verify"])?;
    ensure!(there["outcome"] == "completed" && there["verified"] == true, "{there}");
    ensure!(there["epoch"] == 2, "{there}");
    ensure!(pair.a.state_of(pulse.name)?.is_none(), "it is still listed at the source");
    expect_alive(&pair.b, pulse.name, 5)?;

    let back = pair.back(pulse.name, &["--verify"])?;
    ensure!(back["outcome"] == "completed" && back["verified"] == true, "{back}");
    ensure!(back["epoch"] == 3, "{back}");
    let summary = expect_alive(&pair.a, pulse.name, 5)?;
    ensure!(summary.first == 1, "the log does not begin where the guest did: {summary:?}");
    pair.finish(pulse.name)
}

#[test]
fn a_guest_with_one_vcpu_moves_there_and_back() -> Result<()> {
    there_and_back(1)
}

#[test]
fn a_guest_with_two_vcpus_moves_there_and_back() -> Result<()> {
    there_and_back(2)
}

#[test]
fn mode_stop_moves_everything_while_the_guest_stands_still() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let moved = pair.there(pulse.name, &["--mode", "stop", "--verify"])?;
    ensure!(moved["mode"] == "stop" && moved["verified"] == true, "{moved}");
    ensure!(moved["rounds"].as_array().is_some_and(Vec::is_empty), "{moved}");
    expect_alive(&pair.b, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn the_report_counts_what_was_sent_and_what_never_existed() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let moved = pair.there(pulse.name, &[])?;
    let figure = |name: &str| moved[name].as_u64().with_context(|| format!("{name}: {moved}"));
    let filled = u64::from(pulse.filled + pulse.hot) << 8;
    let all = u64::from(pulse.memory) << 8;
    ensure!(figure("pages_sent")? >= filled, "fewer than {filled} pages: {moved}");
    ensure!(figure("bytes_on_wire")? >= filled << 12, "fewer bytes than pages: {moved}");
    let (skipped, sent) = (figure("pages_skipped")?, figure("pages_sent")?);
    ensure!(skipped > all / 2 && skipped + sent >= all, "{skipped} skipped of {all}: {moved}");
    ensure!(moved["verified"].is_null(), "{moved}");
    ensure!(!moved["rounds"].as_array().context("no rounds")?.is_empty(), "{moved}");

    let parts = moved["downtime_breakdown_ms"].as_object().context("no breakdown")?;
    let sum: f64 = parts.values().filter_map(serde_json::Value::as_f64).sum();
    let downtime = moved["downtime_ms"].as_f64().context("no downtime")?;
    ensure!((sum - downtime).abs() < 0.1, "the parts make {sum}, not {downtime}: {moved}");
    pair.finish(pulse.name)
}

#[test]
fn a_paused_guest_arrives_paused_and_goes_on_when_resumed() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    pair.a.migctl(&["pause", pulse.name])?.ok()?;
    let paused_at = heartbeats(&pair.a, pulse.name)?.last_pass();
    pair.there(pulse.name, &["--verify"])?;
    ensure!(pair.b.state_of(pulse.name)?.as_deref() == Some("paused"));
    ensure!(heartbeats(&pair.b, pulse.name)?.last_pass() == paused_at, "it ran while paused");
    pair.b.migctl(&["resume", pulse.name])?.ok()?;
    wait_for_pass(&pair.b, pulse.name, paused_at + 5)?.check()?;
    expect_alive(&pair.b, pulse.name, 1)?;
    pair.finish(pulse.name)
}

#[test]
fn a_followed_log_goes_on_at_the_new_host() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let mut follower = pair.a.start_migctl(&["-o", "json", "logs", pulse.name, "--follow"])?;
    pair.there(pulse.name, &[])?;
    let moved_at = heartbeats(&pair.b, pulse.name)?.last_pass();
    let followed = wait::until("the followed log to go on", || {
        let beats = scenario::Heartbeats::parse(&follower.stdout()?)?;
        Ok((beats.last_pass() > moved_at + 5).then_some(beats))
    })?;
    ensure!(followed.check()?.first == 1, "the log did not begin at its beginning");
    drop(follower);
    pair.finish(pulse.name)
}

#[test]
fn timestamps_of_the_log_never_go_back_over_a_move() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    pair.there(pulse.name, &[])?;
    expect_alive(&pair.b, pulse.name, 3)?;
    let log = pair.b.migctl(&["logs", pulse.name, "--timestamps"])?.ok()?;
    let mut last = (0, 0);
    for line in log.stdout.lines().filter(|line| line.contains("pulse pass=")) {
        let stamp = line.split(' ').next().and_then(|stamp| stamp.split_once('.'));
        let (seconds, nanos) = stamp.with_context(|| format!("no time in {line:?}"))?;
        ensure!(nanos.len() == 9, "not nanoseconds: {line:?}");
        let stamp: (u64, u32) = (seconds.parse()?, nanos.parse()?);
        ensure!(stamp >= last, "{stamp:?} follows {last:?}");
        last = stamp;
    }
    ensure!(last.0 > 1_700_000_000, "no heartbeat has a time: {}", log.stdout);
    pair.finish(pulse.name)
}

#[test]
fn the_console_reaches_the_guest_before_and_after_a_move() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    for (host, word) in [(&pair.a, "before"), (&pair.b, "after")] {
        if word == "after" {
            pair.there(pulse.name, &[])?;
        }
        let said = [&format!("echo: {word}"), "pulse verified all errors=0"];
        converse(host, pulse.name, &format!("{word}\nverify\n"), &said)?;
    }
    pair.finish(pulse.name)
}

#[test]
fn a_dry_run_says_what_would_happen_and_touches_nothing() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let plan = pair.there(pulse.name, &["--dry-run"])?;
    ensure!(plan["possible"] == true, "{plan}");
    ensure!(plan["memory_bytes"] == u64::from(pulse.memory) << 20, "{plan}");
    let populated = plan["populated_bytes"].as_u64().context("no populated_bytes")?;
    ensure!(populated >= u64::from(pulse.filled) << 20, "{plan}");
    ensure!(plan["destination_version"].is_string(), "{plan}");
    integration::leaks::expect_nothing_left(&pair.b)?;
    expect_alive(&pair.a, pulse.name, 3)?;
    pair.finish(pulse.name)
}

#[test]
fn a_snapshot_is_restored_at_another_host_and_goes_on_counting() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small().cpus(2);
    pulse.run(&pair, &pair.a)?;
    let directory = pair.directory().join("snapshot").display().to_string();
    let written = pair.a.ask(&["checkpoint", pulse.name, "--to", &directory])?;
    ensure!(written["pages_written"].as_u64() > Some(u64::from(pulse.filled) << 8), "{written}");
    expect_alive(&pair.a, pulse.name, 3)?;
    let again = pair.a.migctl(&["checkpoint", pulse.name, "--to", &directory])?;
    again.expect(1, &["empty"])?;

    pair.b.migctl(&["restore", "--from", &directory, "--name", "copy"])?.ok()?;
    let from = heartbeats(&pair.b, "copy")?.last_pass();
    wait_for_pass(&pair.b, "copy", from + 10)?.check()?;
    converse(&pair.b, "copy", "verify\n", &["pulse verified all errors=0"])?;
    pair.b.migctl(&["stop", "copy", "--force"])?.ok()?;
    pair.b.migctl(&["rm", "copy"])?.ok()?;
    pair.finish(pulse.name)
}

#[test]
fn a_restored_guest_can_be_moved() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let directory = pair.directory().join("snapshot").display().to_string();
    pair.a.migctl(&["checkpoint", pulse.name, "--to", &directory])?.ok()?;
    pair.a.migctl(&["stop", pulse.name, "--force"])?.ok()?;
    pair.a.migctl(&["rm", pulse.name])?.ok()?;
    pair.a.migctl(&["restore", "--from", &directory])?.ok()?;
    pair.there(pulse.name, &["--verify"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn a_guest_whose_memory_lies_on_both_sides_of_the_32_bit_hole_moves_whole() -> Result<()> {
    let pair = HostPair::start()?;
    // RAM goes up to 3 GiB and on from 4 GiB: the last 12 MiB below and the first above.
    let pulse = Pulse { memory: 4096, skip: 3058, ..Pulse::small() };
    pulse.run(&pair, &pair.a)?;
    let log = pair.a.migctl(&["logs", pulse.name])?.ok()?.stdout;
    ensure!(log.contains("pulse plan static 0x100000000.."), "nothing is above the hole:\n{log}");
    pair.there(pulse.name, &["--verify"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    pair.finish(pulse.name)
}
