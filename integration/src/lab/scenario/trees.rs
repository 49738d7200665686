//! Process trees, and containers, move between hosts whose kernels track memory.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::containers;
use super::table::{Table, figure};
use crate::lab::Lab;
use crate::lab::daemon::STATE;
use crate::lab::host::{Host, tail};
use crate::lab::layout::BRIDGE;
use crate::lab::settings::Settings;
use crate::migctl::Ran;
use crate::process::PYTHON;
use crate::wait;

pub(super) const SERVER: &str = include_str!("../../process/server.py");
const CLIENT: &str = include_str!("../../process/client.py");
pub(super) const DIRTY: &str = include_str!("dirty.py");
const ADDRESS: &str = "10.99.0.60";
pub(super) const PORT: &str = "7000";
/// While this file is there the client goes on.
const GO_ON: &str = "/run/client-goes-on";
const CLIENT_LOG: &str = "/run/client.log";
/// Answers that a client must get before its connection is believed to live: more than
/// it has messages under way.
const SOME: u64 = 100;
/// What file systems in memory may take more than before, in KiB.
const SHMEM_SLACK: u64 = 4096;

/// A lab whose daemons can move process trees and track memory.
fn lab() -> Result<Lab> {
    let criu = std::env::var("MIGR_CRIU").ok().filter(|path| !path.is_empty()).context(
        "these scenarios need CRIU: put the path that integration/install-criu.sh prints into \
         MIGR_CRIU",
    )?;
    let lab = Lab::boot(&Settings::default())?;
    for host in lab.hosts() {
        host.start_migrd(&["--criu", &criu])?;
        let here = host.ask(&["hosts"])?;
        ensure!(here["hosts"][0]["criu"].is_string(), "no CRIU works in a host: {here}");
    }
    Ok(lab)
}

fn run(host: &Host, name: &str, options: &[&str], script: &str, args: &[&str]) -> Result<()> {
    let command = ["--", PYTHON, "-c", script];
    host.migctl(&[&["exec-process", name], options, &command, args].concat())?.ok().map(drop)
}

/// Moves it, as short as that goes; the report of a move that completed.
pub(super) fn moved(name: &str, from: &Host, to: &Host, options: &[&str]) -> Result<Value> {
    let address = to.number().migrd().to_string();
    let report = from.ask(&[&["migrate", name, "--to", &address], options].concat())?;
    let way = format!("from host {} to {}", from.number(), to.number());
    ensure!(report["outcome"] == "completed", "{way}: {report}");
    ensure!(from.state_of(name)?.is_none_or(|state| state == "gone"), "{way}: it stayed, too");
    ensure!(to.state_of(name)?.as_deref() == Some("running"), "{way}: it does not run");
    Ok(report)
}

/// What a host has of process trees, beside `shmem`: nothing when it has none.
#[derive(Debug)]
struct Left {
    things: String,
    shmem_kib: u64,
}

impl Left {
    fn at(host: &Host) -> Result<Self> {
        let things = host.sh(&format!(
            "ls -d /sys/fs/cgroup/migr-* 2>/dev/null
             for kind in processes containers rootfs runc; do
                 ls -d {STATE}/$kind/* 2>/dev/null
             done
             for net in /sys/class/net/*; do
                 [ -e $net/master ] && [ ${{net##*/}} != eth0 ] && echo $net
             done
             for comm in /proc/[0-9]*/comm; do
                 read -r name <$comm 2>/dev/null && [ \"$name\" = criu ] && echo $comm
             done
             cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o '[p]rocess-keeper --criu'
             true"
        ))?;
        let shmem = host.sh("sed -n 's/^Shmem: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
        Ok(Self { things, shmem_kib: shmem.trim().parse()? })
    }
}

/// Fails unless nothing of the trees that were there is left in the lab.
fn nothing_is_left(lab: &Lab, before: &[Left]) -> Result<()> {
    for (host, before) in lab.hosts().iter().zip(before) {
        wait::patiently("what trees had to go", || {
            let left = Left::at(host)?;
            ensure!(left.things.lines().count() < 50, "host {}: {left:?}", host.number());
            let shmem = left.shmem_kib < before.shmem_kib + SHMEM_SLACK;
            Ok((left.things == before.things && shmem).then_some(()))
        })
        .with_context(|| {
            format!("host {}: {:?}, then {before:?}", host.number(), Left::at(host))
        })?;
    }
    Ok(())
}

pub(super) fn ends(host: &Host, name: &str) -> Result<()> {
    host.migctl(&["stop", name, "--force"])?.ok()?;
    host.migctl(&["rm", name])?.ok().map(drop)
}

/// A client in a host of a server that moves.
pub(super) struct Client<'a> {
    host: &'a Host,
}

impl<'a> Client<'a> {
    pub(super) fn start(host: &'a Host, address: &str) -> Result<Self> {
        host.sh(&format!("rm -f {CLIENT_LOG}; touch {GO_ON}"))?;
        let script = format!("while [ -e {GO_ON} ]; do sleep 0.2; done | \"$@\"");
        let words = ["sh", "-c", &script, "-", PYTHON, "-c", CLIENT, address, PORT];
        host.spawn(&words, &[], CLIENT_LOG)?;
        let client = Self { host };
        client.goes_on()?;
        Ok(client)
    }

    fn said(&self) -> Result<String> {
        self.host.sh(&format!("tail -n 3 {CLIENT_LOG}"))
    }

    fn answers(&self) -> Result<u64> {
        let said = self.said()?;
        ensure!(!said.contains("WRONG"), "the client says {said}");
        let last = said
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("ok ")?.split(' ').next()?.parse().ok());
        Ok(last.unwrap_or(0))
    }

    /// Waits until its connection has shown that it lives.
    pub(super) fn goes_on(&self) -> Result<u64> {
        let before = self.answers()?;
        wait::patiently(&format!("the client to be answered after {before}"), || {
            let now = self.answers()?;
            Ok((now >= before + SOME).then_some(now))
        })
    }

    /// Has it end, with an answer to everything.
    pub(super) fn finish(self) -> Result<()> {
        self.host.sh(&format!("rm {GO_ON}"))?;
        wait::patiently("the client to end", || {
            let said = self.said()?;
            ensure!(!said.contains("WRONG"), "the client says {said}");
            Ok(said.lines().any(|line| line == "done").then_some(()))
        })
    }
}

/// The modes that a tree moves in, one after the other.
const MODES: [&str; 3] = ["precopy", "stop", "postcopy"];

/// A server with a network of its own moves there and back, in each mode by turns, and a
/// client in a host keeps its connection. Then the same of a container, once, with
/// snapshots of it.
///
/// # Errors
/// When anything is not as if it had never moved, or something of it stays.
pub fn there_and_back(moves: usize) -> Result<()> {
    let lab = lab()?;
    let before = lab.hosts().iter().map(Left::at).collect::<Result<Vec<_>>>()?;
    let net = format!("ip={ADDRESS}/24,bridge={BRIDGE}");
    run(lab.host(1)?, "echo", &["--net", &net], SERVER, &[PORT, "128"])?;
    lab.host(1)?.wait_for_output("echo", "listening")?;
    let client = Client::start(lab.host(2)?, ADDRESS)?;
    let columns = ["move", "way", "mode", "total ms", "downtime ms", "rounds", "answers"];
    let mut table = Table::new("Moves of a process with a connection", &columns);
    for number in 0..moves {
        let (from, to) = if number.is_multiple_of(2) { (1, 2) } else { (2, 1) };
        let mode = MODES[number % MODES.len()];
        // Memory that comes later can't be compared before the server runs.
        let verify = if mode == "postcopy" { &[][..] } else { &["--verify"] };
        let options = [&["--mode", mode], verify].concat();
        let report = moved("echo", lab.host(from)?, lab.host(to)?, &options)?;
        ensure!(report["mode"] == mode, "{report}");
        ensure!((report["verified"] == true) == (mode != "postcopy"), "{report}");
        let after = report["pages_after_switch"].as_u64().unwrap_or(0);
        ensure!((after > 0) == (mode == "postcopy"), "{report}");
        let rounds = report["rounds"].as_array().map_or(0, Vec::len);
        ensure!((rounds > 0) == (mode == "precopy"), "{report}");
        let answers = client.goes_on().with_context(|| format!("after move {}", number + 1))?;
        let row = [
            (number + 1).to_string(),
            format!("{from} to {to}"),
            mode.to_owned(),
            figure(&report, "total_ms"),
            figure(&report, "downtime_ms"),
            rounds.to_string(),
            answers.to_string(),
        ];
        eprintln!("move {}", row.join("  "));
        table.row(&row);
    }
    client.finish()?;
    let home = lab.host(if moves.is_multiple_of(2) { 1 } else { 2 })?;
    // The server compares its memory and the messages, and says what is wrong.
    let said = home.wait_for_output("echo", "ended")?;
    ensure!(!said.contains("WRONG"), "the server says\n{}", tail(&said, 5));
    ensure!(said.matches("accepted").count() == 1, "more than one connection:\n{said}");
    ends(home, "echo")?;
    table.print();
    what_tls_is_in_the_kernel_is_named(&lab)?;
    containers::goes_ahead(&lab)?;
    nothing_is_left(&lab, &before)?;
    lab.done();
    Ok(())
}

/// A connection to itself that the kernel encrypts, as far as CRIU would see.
const ENCRYPTED: &str = "import socket, time\n\
                         l = socket.create_server(('127.0.0.1', 0))\n\
                         near = socket.create_connection(l.getsockname())\n\
                         far, _ = l.accept()\n\
                         near.setsockopt(socket.IPPROTO_TCP, 31, b'tls')\n\
                         print('encrypted', flush=True)\n\
                         time.sleep(100000)";

/// The kernels that tests run on elsewhere need not have it.
fn what_tls_is_in_the_kernel_is_named(lab: &Lab) -> Result<()> {
    let (here, there) = (lab.host(1)?, lab.host(2)?);
    run(here, "encrypted", &[], ENCRYPTED, &[])?;
    here.wait_for_output("encrypted", "encrypted")?;
    let to = there.number().migrd().to_string();
    let plan = here.migctl(&["migrate", "encrypted", "--to", &to, "--dry-run"])?;
    plan.expect(3, &["tcp-ulp", "tls above it in the kernel"])?;
    ends(here, "encrypted")
}

/// Where snapshots are, in a host.
const SNAPSHOTS: &str = "/lab/disk/snapshots";

/// Where the snapshot of that name is.
pub(super) fn place(name: &str) -> String {
    format!("{SNAPSHOTS}/{name}")
}

/// Saves a workload, on top of the snapshot `parent` if there is one; how that ended.
pub(super) fn save(host: &Host, what: &str, name: &str, parent: Option<&str>) -> Result<Ran> {
    host.sh(&format!("mkdir -p {SNAPSHOTS}"))?;
    let (to, parent) = (place(name), parent.map(place));
    let mut words = vec!["checkpoint", what, "--to", &to];
    words.extend(parent.iter().flat_map(|parent| ["--parent", parent]));
    host.migctl(&words)
}

/// How many bytes the images of memory of a snapshot have.
pub(super) fn pages_bytes(host: &Host, snapshot: &str) -> Result<u64> {
    let said = host.sh(&format!("cat {SNAPSHOTS}/{snapshot}/images/pages-*.img | wc -c"))?;
    Ok(said.trim().parse()?)
}

/// Snapshots of a process of so much memory, in MiB, build on each other: the second and
/// the third have what was written meanwhile, and the process is made anew of all of them.
///
/// # Errors
/// When one has more than that, or what is made anew is not whole.
pub fn snapshots_build_on_each_other(mib: u32) -> Result<()> {
    let lab = lab()?;
    let host = lab.host(1)?;
    let before = lab.hosts().iter().map(Left::at).collect::<Result<Vec<_>>>()?;
    let (mib, rate) = (mib.to_string(), (mib * 256 / 100).to_string());
    run(host, "dirty", &[], DIRTY, &[&mib, &rate])?;
    host.wait_for_output("dirty", "beat 20")?;
    let save = |name: &str, parent| save(host, "dirty", name, parent);
    save("1", None)?.ok()?;
    is_whole(host, "dirty")?;
    save("2", Some("1"))?.ok()?;
    is_whole(host, "dirty")?;
    save("3", Some("2"))?.ok()?;
    // What was written since is known of the last one only.
    save("4", Some("1"))?.expect(1, &["build on the last snapshot"])?;
    let sizes = ["1", "2", "3"].map(|name| pages_bytes(host, name));
    let [all, second, third] = sizes;
    let (all, second, third) = (all?, second?, third?);
    println!("images of memory: {all}, then {second} and {third} bytes");
    ensure!(second < all / 2 && third < all / 2, "{all}, {second} and {third} bytes");
    ends(host, "dirty")?;
    host.migctl(&["restore", "--from", &place("3"), "--name", "again"])?.ok()?;
    is_whole(host, "again")?;
    ends(host, "again")?;
    host.sh(&format!("mv {SNAPSHOTS}/2 {SNAPSHOTS}/away"))?;
    let words = ["restore", "--from", &place("3"), "--name", "again"];
    host.migctl(&words)?.expect(1, &["snapshots/2", "which is not there"])?;
    host.sh(&format!("mv {SNAPSHOTS}/away {SNAPSHOTS}/2"))?;
    let image = format!("$(ls {SNAPSHOTS}/1/images/pages-*.img | head -n 1)");
    host.sh(&format!("printf x | dd of={image} bs=1 seek=4096 conv=notrunc 2>/dev/null"))?;
    host.migctl(&words)?.expect(1, &["snapshots/1", "its content is not what was written"])?;
    host.sh(&format!("rm -r {SNAPSHOTS}"))?;
    nothing_is_left(&lab, &before)?;
    lab.done();
    Ok(())
}

/// The longest time between two beats, as its host has seen them come, in ms.
fn longest_silence(log: &str) -> Option<f64> {
    let times: Vec<f64> = log
        .lines()
        .filter(|line| line.contains(" beat "))
        .filter_map(|line| line.split(' ').next()?.trim_matches(['[', ']']).parse().ok())
        .collect();
    let silences = times.windows(2).map(|pair| (pair[1] - pair[0]) * 1000.0);
    silences.fold(None, |longest: Option<f64>, silence| Some(longest.unwrap_or(0.0).max(silence)))
}

/// Has the process compare all its memory, and waits for its word.
pub(super) fn is_whole(host: &Host, name: &str) -> Result<()> {
    let before = host.guest_log(name)?.matches("whole after").count();
    let pid = host.ask(&["inspect", name])?["process"]["pid"].as_u64().context("it has no pid")?;
    host.sh(&format!("kill -USR1 {pid}"))?;
    wait::patiently("the process to compare its memory", || {
        let log = host.guest_log(name)?;
        ensure!(!log.contains("WRONG"), "the process says\n{}", tail(&log, 3));
        Ok((log.matches("whole after").count() > before).then_some(()))
    })
}

/// A process of so much memory, in MiB, that writes one in a hundred of its pages each
/// second moves without precopy, and with it, which is chosen unasked. What part of the
/// one stop the other is, is printed.
///
/// # Errors
/// When its memory does not go ahead or is not whole, or something stays.
pub fn memory_goes_ahead(mib: u32) -> Result<()> {
    let lab = lab()?;
    let (one, two) = (lab.host(1)?, lab.host(2)?);
    let before = lab.hosts().iter().map(Left::at).collect::<Result<Vec<_>>>()?;
    let title = format!("Stops of {mib} MiB, 1 % of it written each second");
    let (mib, rate) = (mib.to_string(), (mib * 256 / 100).to_string());
    run(one, "dirty", &[], DIRTY, &[&mib, &rate])?;
    one.wait_for_output("dirty", "beat 20")?;
    let columns = ["mode", "total ms", "downtime ms", "MiB", "rounds, MiB", "rounds, ms"];
    let mut table = Table::new(&title, &columns);
    let mut stops = Vec::new();
    for (from, to, options) in [(one, two, &["--mode", "stop"][..]), (two, one, &[])] {
        let report = moved("dirty", from, to, options)?;
        note(&mut table, &report);
        stops.push(report);
        is_whole(to, "dirty")?;
    }
    let [stop, precopy] = &stops[..] else { anyhow::bail!("{stops:?}") };
    ensure!(precopy["mode"] == "precopy", "precopy was not chosen: {precopy}");
    let rounds = precopy["rounds"].as_array().map_or(0, Vec::len);
    ensure!(rounds >= 2, "only {rounds} rounds: {precopy}");
    let reason = precopy["mode_reason"].as_str().unwrap_or_default().to_owned();
    let log = one.migctl(&["logs", "dirty", "--timestamps"])?.ok()?.stdout;
    let silence = longest_silence(&log).context("no beats in the log")?;
    ends(one, "dirty")?;
    nothing_is_left(&lab, &before)?;
    table.print();
    let ms = |report: &Value| report["downtime_ms"].as_f64().context("no downtime");
    let part = ms(precopy)? / ms(stop)?;
    println!(
        "precopy: {reason}\nits stop is {part:.2} of the other; longest silence of the process \
         in all its life {silence:.0} ms"
    );
    lab.done();
    Ok(())
}

/// What each round of a move had, in such a unit.
pub(super) fn figures(report: &Value, name: &str, unit: f64) -> String {
    let rounds = report["rounds"].as_array().cloned().unwrap_or_default();
    let each = rounds.iter().map(|round| round[name].as_f64().unwrap_or_default() / unit);
    each.map(|value| format!("{value:.1}")).collect::<Vec<_>>().join(" ")
}

fn note(table: &mut Table, report: &Value) {
    let mib = f64::from(1 << 20);
    let row = [
        report["mode"].as_str().unwrap_or_default().to_owned(),
        figure(report, "total_ms"),
        figure(report, "downtime_ms"),
        format!("{:.1}", report["bytes_on_wire"].as_f64().unwrap_or_default() / mib),
        figures(report, "bytes", mib),
        figures(report, "ms", 1.0),
    ];
    eprintln!("{} {}", row.join("  "), report["downtime_breakdown_ms"]);
    table.row(&row);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_silence_is_between_beats_only() {
        let log = "[10.000000000] beat 1\n[10.050000000] beat 2\n[12.050000000] whole after 7\n\
                   [12.150000000] beat 3\n[12.200000000] beat 4\n";
        let silence = longest_silence(log).unwrap();
        assert!((silence - 2100.0).abs() < 0.01, "{silence}");
        assert_eq!(longest_silence("[1.0] beat 1\n"), None);
    }
}
