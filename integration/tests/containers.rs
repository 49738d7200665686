//! Containers that runc makes and CRIU moves, between whole daemons of this machine.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use integration::daemon::Daemon;
use integration::host_pair::HostPair;
use integration::leaks;
use integration::migctl::Ran;
use integration::process::container::{
    Bundle, NAME, PORT, counter, identity, inspect, is_whole, spec,
};
use integration::process::{
    Counter, can_move, hosts, left, lines, moved, moves, start_moving, wait_for_state,
};
use integration::two_nets::{BRIDGE, Side, TwoNets, on_two_hosts};
use integration::wait;
use serde_json::json;

const ADDRESS: &str = "10.98.0.60";

/// Two daemons, and a bundle that both find.
fn with_bundle() -> Result<(HostPair, Bundle)> {
    let pair = hosts()?;
    let bundle = Bundle::make(pair.directory())?;
    Ok((pair, bundle))
}

/// What a move there would meet, without anything being touched.
fn plan(from: &Daemon, to: &Daemon) -> Result<Ran> {
    moved(from, to, NAME, &["--dry-run"])
}

#[test]
fn a_container_moves_there_and_back_with_its_limits_its_log_and_its_runc() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    bundle.run(&pair.a, &[])?;
    let listed = pair.a.workloads()?;
    ensure!(listed[0]["kind"] == "container", "{listed:?}");
    is_whole(&pair.a)?;
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a), (&pair.a, &pair.b)] {
        let before = counter().last(from)?;
        let report = moves(from, to, NAME, &["--verify"])?;
        ensure!(report["kind"] == "container" && report["verified"] == true, "{report}");
        ensure!(counter().counts(to, 5)? > before, "it counts anew");
        is_whole(to)?;
        leaks::expect_nothing_left(from)?;
    }
    let rootfs = bundle.rootfs();
    let said = inspect(&pair.b)?;
    let shown = &said["process"]["container"]["rootfs"];
    ensure!(shown.as_str().map(Path::new) == Some(&rootfs), "{said}");
    pair.finish(NAME)?;
    ensure!(rootfs.join("bin/busybox").is_file(), "its root file system is gone");
    Ok(())
}

/// A connection to the container's server, which repeats what it is told.
struct Echo(TcpStream);

impl Echo {
    fn connect() -> Result<Self> {
        let address: SocketAddr = format!("{ADDRESS}:{PORT}").parse()?;
        Ok(Self(wait::until("the container to answer", || Ok(TcpStream::connect(address).ok()))?))
    }

    fn says(&mut self, text: &str) -> Result<()> {
        self.0.write_all(text.as_bytes())?;
        let mut back = vec![0; text.len()];
        self.0.read_exact(&mut back)?;
        ensure!(back == text.as_bytes(), "it said {:?}", String::from_utf8_lossy(&back));
        Ok(())
    }
}

#[test]
fn an_established_connection_of_a_container_moves_there_and_back() -> Result<()> {
    on_two_hosts(|nets: &mut TwoNets| {
        nets.start()?;
        can_move(&nets.a)?;
        let bundle = Bundle::make(nets.directory())?;
        let net = format!("ip={ADDRESS}/24,bridge={BRIDGE}");
        bundle.run(&nets.a, &["--net", &net])?;
        let mut echo = Echo::connect()?;
        echo.says("before")?;
        for (from, to, left) in [(&nets.a, &nets.b, Side::A), (&nets.b, &nets.a, Side::B)] {
            moves(from, to, NAME, &[])?;
            echo.says("and after the move")?;
            counter().counts(to, 5)?;
            is_whole(to)?;
            Echo::connect()?.says("a new one")?;
            nets.expect_nothing_left(left)?;
        }
        nets.a.migctl(&["stop", NAME, "--force"])?.ok()?;
        nets.a.migctl(&["rm", NAME])?.ok()?;
        nets.expect_nothing_left(Side::A)
    })
}

#[test]
fn the_end_of_a_container_is_reported_wherever_it_ends() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    let program = "i=0; while ! [ -e /data/end ]; do i=$((i+1)); echo count $i; sleep 0.05; done; \
                   exit 7";
    bundle.write(&spec(program))?;
    bundle.run(&pair.a, &[])?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    counter().counts(&pair.b, 2)?;
    // What is mounted into it is there, too.
    fs::write(bundle.path.join("data/end"), "")?;
    wait_for_state(&pair.b, NAME, "stopped")?;
    let said = inspect(&pair.b)?.to_string();
    ensure!(said.contains("exited with status 7"), "{said}");
    pair.finish(NAME)
}

#[test]
fn hooks_run_where_the_container_begins_and_ends() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    let notes = bundle.path.join("notes");
    let hook = |word: &str| {
        let note = format!("echo {word} >> {}", notes.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", note]}])
    };
    let mut spec = bundle.spec()?;
    spec["hooks"] = json!({"createRuntime": hook("created"), "poststop": hook("stopped")});
    bundle.write(&spec)?;
    bundle.run(&pair.a, &[])?;
    ensure!(fs::read_to_string(&notes)? == "created\n", "{:?}", fs::read_to_string(&notes));
    moves(&pair.a, &pair.b, NAME, &[])?;
    leaks::expect_nothing_left(&pair.a)?;
    let noted = fs::read_to_string(&notes)?;
    ensure!(noted == "created\ncreated\nstopped\n", "{noted:?}");
    pair.finish(NAME)
}

#[test]
fn a_directory_that_is_mounted_by_a_symbolic_link_moves() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    let (real, link) = (bundle.path.join("data"), bundle.path.join("link"));
    symlink(&real, &link)?;
    let mut spec = bundle.spec()?;
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    let data = mounts.iter_mut().find(|mount| mount["destination"] == "/data");
    data.context("no data")?["source"] = json!(link);
    bundle.write(&spec)?;
    bundle.run(&pair.a, &[])?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    is_whole(&pair.b)?;
    // A link that leads nowhere is as good as none.
    fs::rename(&real, bundle.path.join("away"))?;
    plan(&pair.b, &pair.a)?.expect(3, &["container-mount", "link"])?;
    fs::rename(bundle.path.join("away"), &real)?;
    moves(&pair.b, &pair.a, NAME, &[])?;
    counter().counts(&pair.a, 5)?;
    pair.finish(NAME)
}

#[test]
fn a_container_that_is_paused_moves_paused() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    bundle.run(&pair.a, &[])?;
    pair.a.migctl(&["pause", NAME])?.ok()?;
    let before = lines(&pair.a, NAME)?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    ensure!(pair.b.state_of(NAME)?.as_deref() == Some("paused"), "{:?}", pair.b.workloads()?);
    ensure!(lines(&pair.b, NAME)? == before, "it has gone on");
    pair.b.migctl(&["resume", NAME])?.ok()?;
    counter().counts(&pair.b, 5)?;
    is_whole(&pair.b)?;
    pair.finish(NAME)
}

#[test]
fn a_container_outlives_its_daemon() -> Result<()> {
    let (mut pair, bundle) = with_bundle()?;
    bundle.run(&pair.a, &[])?;
    pair.a.kill()?;
    pair.a.restart()?;
    counter().counts(&pair.a, 5)?;
    is_whole(&pair.a)?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    counter().counts(&pair.b, 5)?;
    pair.finish(NAME)
}

#[test]
fn a_container_that_loses_its_keeper_ends_and_leaves_nothing() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    bundle.run(&pair.a, &[])?;
    left::kill_trees(pair.a.state_dir())?;
    wait_for_state(&pair.a, NAME, "stopped")?;
    pair.finish(NAME)
}

#[test]
fn a_host_without_runc_starts_no_container_and_takes_none() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let bundle = Bundle::make(pair.directory())?;
    pair.b.runc(&pair.directory().join("no-runc"));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    bundle.start(&pair.b, &[])?.expect(1, &["runc", "--runc"])?;
    bundle.run(&pair.a, &[])?;
    plan(&pair.a, &pair.b)?.expect(3, &["runc", "--runc"])?;
    moved(&pair.a, &pair.b, NAME, &[])?.expect(3, &["runc"])?;
    counter().counts(&pair.a, 2)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(NAME)
}

#[test]
fn a_root_file_system_that_is_missing_at_the_destination_is_named_in_the_plan() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    bundle.run(&pair.a, &[])?;
    let (rootfs, away) = (bundle.rootfs(), bundle.path.join("away"));
    // The container still has it. Another host would not have it at all.
    fs::rename(&rootfs, &away)?;
    let named = rootfs.display().to_string();
    let program = rootfs.join("bin/busybox").display().to_string();
    let words = ["container-rootfs", &named, "rsync", "destination-file-missing", &program];
    plan(&pair.a, &pair.b)?.expect(3, &words)?;
    fs::rename(&away, &rootfs)?;
    fs::rename(bundle.path.join("data"), bundle.path.join("no-data"))?;
    plan(&pair.a, &pair.b)?.expect(3, &["container-mount", "/data"])?;
    fs::rename(bundle.path.join("no-data"), bundle.path.join("data"))?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    counter().counts(&pair.b, 5)?;
    pair.finish(NAME)
}

#[test]
fn what_was_started_in_a_container_from_outside_is_named_in_the_plan() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    bundle.run(&pair.a, &[])?;
    let (id, _) = identity(&pair.a)?;
    let mut session = exec_cat(&pair.a, &id)?;
    let seen = wait::until("the plan to name it", || {
        let ran = plan(&pair.a, &pair.b)?;
        // Until it has become that, it is runc.
        Ok(ran.stdout.contains("cat (").then_some(ran))
    });
    drop(session.stdin.take());
    session.wait()?;
    seen?.expect(3, &["exec-session", "cat", "runc exec"])?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    counter().counts(&pair.b, 5)?;
    pair.finish(NAME)
}

/// A `cat` in the host's container that runc knows as `id`, until its input is closed.
fn exec_cat(host: &Daemon, id: &str) -> Result<Child> {
    let mut session = Command::new("runc");
    session.arg("--root").arg(host.state_dir().join("runc"));
    session.args(["exec", id, "/bin/cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    session.spawn().context("install runc")
}

#[test]
fn what_is_started_in_a_container_behind_the_plan_keeps_it_where_it_is() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let bundle = Bundle::make(pair.directory())?;
    pair.a.halt_at(Some("source-offered"));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    bundle.run(&pair.a, &[])?;
    let (id, _) = identity(&pair.a)?;
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    pair.a.wait_halted()?;
    let mut session = exec_cat(&pair.a, &id)?;
    let mut say = session.stdin.take().context("no input")?;
    say.write_all(b"here")?;
    session.stdout.take().context("no output")?.read_exact(&mut [0; 4])?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["cat (", "started in it from outside", "runc exec"])?;
    let before = counter().last(&pair.a)?;
    ensure!(counter().counts(&pair.a, 5)? > before, "it stands still");
    ensure!(session.try_wait()?.is_none(), "what was started in it has ended");
    drop(say);
    session.wait()?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    counter().counts(&pair.b, 5)?;
    pair.finish(NAME)
}

#[test]
fn a_bundle_that_is_none_is_refused_with_what_to_do() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    let whole = bundle.spec()?;
    fs::remove_file(bundle.path.join("config.json"))?;
    bundle.start(&pair.a, &[])?.expect(1, &["config.json", "runc spec"])?;
    fs::write(bundle.path.join("config.json"), "nothing")?;
    bundle.start(&pair.a, &[])?.expect(1, &["config.json is not a JSON object"])?;
    let mut terminal = whole.clone();
    terminal["process"]["terminal"] = json!(true);
    bundle.write(&terminal)?;
    bundle.start(&pair.a, &[])?.expect(1, &["set process.terminal to false"])?;
    let mut elsewhere = whole.clone();
    elsewhere["root"]["path"] = json!("nowhere");
    bundle.write(&elsewhere)?;
    bundle.start(&pair.a, &[])?.expect(1, &["nowhere is not a directory"])?;
    let mut no_program = whole.clone();
    no_program["process"]["args"] = json!(["/bin/none"]);
    bundle.write(&no_program)?;
    bundle.start(&pair.a, &[])?.expect(1, &["runc:", "/bin/none"])?;
    bundle.write(&whole)?;
    leaks::expect_nothing_left(&pair.a)?;
    bundle.run(&pair.a, &[])?;
    pair.finish(NAME)
}

#[test]
fn a_container_is_saved_and_made_again_under_another_name() -> Result<()> {
    let (pair, bundle) = with_bundle()?;
    bundle.run(&pair.a, &[])?;
    let before = counter().last(&pair.a)?;
    let saved = pair.directory().join("saved");
    let saved = saved.to_str().context("a directory with an odd name")?;
    pair.a.migctl(&["checkpoint", NAME, "--to", saved])?.ok()?;
    counter().counts(&pair.a, 2)?;
    pair.a.migctl(&["stop", NAME, "--force"])?.ok()?;
    let again = Counter { name: "again", ..counter() };
    pair.b.migctl(&["restore", "--from", saved, "--name", again.name])?.ok()?;
    ensure!(again.counts(&pair.b, 3)? > before, "it counts anew");
    pair.b.migctl(&["stop", again.name, "--force"])?.ok()?;
    pair.b.migctl(&["rm", again.name])?.ok()?;
    pair.finish(NAME)
}

/// Where cgroup v2 is all there is, a container sees its own cgroup as the root of all.
#[test]
fn a_container_keeps_its_cgroup_namespace_where_there_is_only_cgroup_v2() -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let only = "umount -R -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup";
    pair.a.before(only);
    pair.b.before(only);
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    let bundle = Bundle::make(pair.directory())?;
    let mut spec = bundle.spec()?;
    // Which limits there are depends on the machine.
    spec["linux"]["resources"] = json!({});
    spec["linux"]["namespaces"].as_array_mut().context("no list")?.push(json!({"type": "cgroup"}));
    let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                       "options": ["nosuid", "noexec", "nodev", "ro"]});
    spec["mounts"].as_array_mut().context("no list")?.push(mount);
    bundle.write(&spec)?;
    bundle.run(&pair.a, &[])?;
    let sees_only_its_own = |host: &Daemon| {
        let (_, pid) = identity(host)?;
        let namespace = fs::read_link(format!("/proc/{pid}/ns/cgroup"))?;
        ensure!(namespace != fs::read_link("/proc/self/ns/cgroup")?, "it has no namespace");
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let own = cgroups.lines().find_map(|line| line.strip_prefix("0::")).context("no cgroup")?;
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        let root = mounts.lines().find(|line| line.contains(" - cgroup2 ")).context("no mount")?;
        ensure!(root.split(' ').nth(3) == Some(own), "{own}, and {root}");
        Ok(())
    };
    sees_only_its_own(&pair.a)?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    sees_only_its_own(&pair.b)?;
    moves(&pair.b, &pair.a, NAME, &[])?;
    sees_only_its_own(&pair.a)?;
    counter().counts(&pair.a, 5)?;
    pair.finish(NAME)
}

/// One daemon is killed where it stands at `point`, and comes back: exactly one host
/// runs the container then, and the other has nothing of it.
fn crash(point: &str, at_source: Option<bool>) -> Result<()> {
    let mut pair = HostPair::without_kvm()?;
    let bundle = Bundle::make(pair.directory())?;
    let source_halts = point.starts_with("source");
    let halting = if source_halts { &mut pair.a } else { &mut pair.b };
    halting.halt_at(Some(point));
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    bundle.run(&pair.a, &[])?;
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    let halted = if source_halts { &mut pair.a } else { &mut pair.b };
    halted.wait_halted()?;
    halted.kill()?;
    halted.restart()?;
    drop(moving);
    let found = pair.runs_at_a(NAME)?;
    ensure!(at_source.is_none_or(|wanted| wanted == found), "at the source: {found}");
    let (here, elsewhere) = if found { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    counter().counts(here, 5)?;
    is_whole(here)?;
    leaks::expect_nothing_left(elsewhere)?;
    // It is not only there, it can go on moving.
    moves(here, elsewhere, NAME, &[])?;
    is_whole(elsewhere)?;
    counter().counts(elsewhere, 5)?;
    pair.finish(NAME)
}

integration::tests_of! {
    crash:
    a_source_killed_while_criu_writes_keeps_the_container("source-frozen", Some(true));
    a_source_killed_before_released_keeps_the_container("source-sealed", Some(true));
    a_source_killed_after_released_ends_with_one_container("source-released", Some(false));
    a_destination_killed_before_it_made_the_container_leaves_it_at_the_source(
        "destination-loading", Some(true)
    );
    a_destination_killed_with_the_container_made_ends_with_one("destination-sealed", Some(true));
    a_destination_killed_when_it_owns_the_container_runs_it("destination-owned", Some(false));
}
