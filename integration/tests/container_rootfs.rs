//! Containers whose root file system moves with them, by CRIU, between whole daemons of
//! this machine of which one does not see the bundle.

use std::fs;
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use integration::host_pair::HostPair;
use integration::leaks;
use integration::process::container::{Bundle, NAME, PORT, counter};
use integration::process::rootfs::{
    add_samples, expect_same, hide, kept_by, picture, plan, rootfs_at, run, run_python,
    writing_spec, written,
};
use integration::process::{can_move, moved, moves, start_moving};
use integration::two_nets::{BRIDGE, Side, TwoNets, on_two_hosts};
use integration::wait;
use serde_json::json;

const ADDRESS: &str = "10.98.0.61";

/// Two daemons that do not run yet; the second does not see the bundle.
fn apart() -> Result<(HostPair, Bundle)> {
    let mut pair = HostPair::without_kvm()?;
    let bundle = Bundle::make(pair.directory())?;
    fs::create_dir_all(bundle.rootfs().join("var/log"))?;
    hide(&bundle, &mut pair.b);
    Ok((pair, bundle))
}

fn start(pair: &mut HostPair) -> Result<()> {
    pair.a.start()?;
    pair.b.start()?;
    can_move(&pair.a)?;
    can_move(&pair.b)
}

#[test]
fn a_server_moves_there_and_back_with_what_it_writes() -> Result<()> {
    on_two_hosts(|nets: &mut TwoNets| {
        let bundle = Bundle::make(nets.directory())?;
        fs::create_dir_all(bundle.rootfs().join("var/log"))?;
        hide(&bundle, &mut nets.b);
        nets.start()?;
        can_move(&nets.a)?;
        let net = format!("ip={ADDRESS}/24,bridge={BRIDGE}");
        run(&bundle, &nets.a, &["--net", &net])?;
        let address: SocketAddr = format!("{ADDRESS}:{PORT}").parse()?;
        let mut client =
            wait::until("the container to answer", || Ok(TcpStream::connect(address).ok()))?;
        let mut say = |text: &str| -> Result<()> {
            use std::io::{Read, Write};
            client.write_all(text.as_bytes())?;
            let mut back = vec![0; text.len()];
            client.read_exact(&mut back)?;
            ensure!(back == text.as_bytes(), "{back:?}");
            Ok(())
        };
        say("before")?;
        ensure!(rootfs_at(&nets.a)? == bundle.rootfs(), "it is not the bundle's");
        let mut left: Option<Vec<String>> = None;
        for (from, to, side) in
            [(&nets.a, &nets.b, Side::A), (&nets.b, &nets.a, Side::B), (&nets.a, &nets.b, Side::A)]
        {
            let before = counter().last(from)?;
            let report = moves(from, to, NAME, &["--verify"])?;
            ensure!(report["verified"] == true, "{report}");
            say("after a move")?;
            counter().counts(to, 5)?;
            let root = rootfs_at(to)?;
            ensure!(root.starts_with(to.state_dir()), "{}", root.display());
            ensure!(written(&root)? > before, "what it writes is not there");
            nets.expect_nothing_left(side)?;
            // What was the user's stays as it was when the container left it.
            let now = picture(&bundle.path)?;
            expect_same(left.as_ref().unwrap_or(&now), &now)?;
            left = Some(now);
        }
        nets.b.migctl(&["stop", NAME, "--force"])?.ok()?;
        ensure!(kept_by(&nets.b)?.len() == 1, "what it has written went with its end");
        nets.b.migctl(&["rm", NAME])?.ok()?;
        nets.expect_nothing_left(Side::B)
    })
}

#[test]
fn everything_that_files_can_have_arrives() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    add_samples(&bundle)?;
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    // What stands still can be compared.
    pair.a.migctl(&["pause", NAME])?.ok()?;
    let before = picture(&bundle.rootfs())?;
    let planned = plan(&pair.a, &pair.b)?.ok()?.json()?;
    let bytes = planned["rootfs_bytes"].as_u64().context("no rootfs_bytes")?;
    let busybox = fs::metadata(bundle.rootfs().join("bin/busybox"))?.len();
    ensure!(bytes > busybox && bytes < busybox + (4 << 20), "holes are counted: {planned}");
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        moves(from, to, NAME, &["--verify"])?;
        expect_same(&before, &picture(&rootfs_at(to)?)?)?;
        leaks::expect_nothing_left(from)?;
    }
    expect_same(&before, &picture(&bundle.rootfs())?)?;
    pair.a.migctl(&["resume", NAME])?.ok()?;
    counter().counts(&pair.a, 5)?;
    pair.finish(NAME)
}

/// What happens to a root file system behind the first look of the source.
const MEANWHILE: &str = "\
import os, sys
os.chdir(sys.argv[1])
open('etc/names', 'a').write(' and more')
os.unlink('etc/same'); open('etc/same', 'w').write('another')
os.rename('etc/owned', 'var/owned'); os.chmod('etc/capable', 0o700)
os.removexattr('var/same', 'user.note')
os.unlink('var/socket'); os.mkdir('var/socket'); open('var/socket/file', 'w').write('x' * 100000)
os.rmdir('etc/secret'); open('etc/secret', 'w').write('no directory now')
os.unlink('etc/link'); os.symlink('busybox', 'etc/link')
with open('var/sparse', 'r+b') as f: f.seek(30 << 20); f.write(b'written'); f.truncate(40 << 20)
os.link('etc/capable', 'var/capable'); os.utime('var/spool', ns=(1, 2))
open('var/mapped', 'wb').write(bytes(8192))
";

#[test]
fn what_changes_while_it_is_sent_arrives_as_it_is_at_the_stop() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    add_samples(&bundle)?;
    pair.a.halt_at(Some("source-files-chunk"));
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    pair.a.migctl(&["pause", NAME])?.ok()?;
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    pair.a.wait_halted()?;
    run_python(MEANWHILE, &bundle.rootfs())?;
    let at_the_stop = picture(&bundle.rootfs())?;
    pair.a.go_on()?;
    moving.wait()?.ok()?;
    expect_same(&at_the_stop, &picture(&rootfs_at(&pair.b)?)?)?;
    pair.b.migctl(&["resume", NAME])?.ok()?;
    counter().counts(&pair.b, 5)?;
    pair.finish(NAME)
}

#[test]
fn a_destination_without_room_is_named_before_anything_is_sent() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    fs::write(bundle.rootfs().join("large"), vec![7; 40 << 20])?;
    let hidden = format!("mount -t tmpfs none {}", bundle.path.display());
    let small = "mkdir -p $STATE/rootfs; mount -t tmpfs -o size=90m none $STATE/rootfs";
    pair.b.before(&format!("{hidden}; {small}"));
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    let words = ["destination-rootfs-space", "rootfs", "make room there"];
    plan(&pair.a, &pair.b)?.expect(3, &words)?;
    moved(&pair.a, &pair.b, NAME, &[])?.expect(3, &["root file system needs"])?;
    counter().counts(&pair.a, 3)?;
    ensure!(kept_by(&pair.b)?.is_empty(), "{:?}", kept_by(&pair.b)?);
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(NAME)
}

#[test]
fn a_disk_that_fills_up_in_the_middle_ends_the_move_and_nothing_else() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    let hidden = format!("mount -t tmpfs none {}", bundle.path.display());
    let small = "mkdir -p $STATE/rootfs; mount -t tmpfs -o size=90m none $STATE/rootfs";
    pair.b.before(&format!("{hidden}; {small}"));
    let large = pair.directory().join("large");
    fs::write(&large, vec![7; 120 << 20])?;
    pair.a.halt_at(Some("source-files-chunk"));
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    pair.a.wait_halted()?;
    // Its peer does not wait for long for a source that says nothing.
    fs::rename(&large, bundle.rootfs().join("large"))?;
    pair.a.go_on()?;
    moving.wait()?.expect(4, &["no room left", "root file system"])?;
    counter().counts(&pair.a, 5)?;
    wait::until("nothing of it to be left", || Ok(kept_by(&pair.b)?.is_empty().then_some(())))?;
    leaks::expect_nothing_left(&pair.b)?;
    ensure!(written(&bundle.rootfs())? > 5, "it does not write any more");
    pair.finish(NAME)
}

#[test]
fn what_does_not_travel_is_named_in_the_plan() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    let inside = bundle.rootfs().join("var/inside");
    fs::create_dir(&inside)?;
    pair.a.before(&format!("mount -t tmpfs none {}", inside.display()));
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    plan(&pair.a, &pair.b)?.expect(3, &["rootfs-mount", "/var/inside", "type bind"])?;
    pair.finish(NAME)?;
    let (mut pair, bundle) = apart()?;
    start(&mut pair)?;
    let device =
        "import os, sys; os.mknod(sys.argv[1] + '/var/kvm', 0o020600, os.makedev(10, 232))";
    run_python(device, &bundle.rootfs())?;
    run(&bundle, &pair.a, &[])?;
    plan(&pair.a, &pair.b)?.expect(3, &["rootfs-device", "/var/kvm", "linux.devices"])?;
    moved(&pair.a, &pair.b, NAME, &[])?.expect(3, &["10:232"])?;
    counter().counts(&pair.a, 3)?;
    leaks::expect_nothing_left(&pair.b)?;
    pair.finish(NAME)
}

#[test]
fn a_device_of_its_specification_travels() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    start(&mut pair)?;
    let device = "import os, sys; os.mknod(sys.argv[1] + '/var/kmsg', 0o020600, os.makedev(1, 11))";
    run_python(device, &bundle.rootfs())?;
    let mut spec = writing_spec()?;
    spec["linux"]["devices"] =
        json!([{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o600}]);
    bundle.write(&spec)?;
    bundle.run(&pair.a, &["--rootfs", "copy"])?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    let made = picture(&rootfs_at(&pair.b)?.join("var"))?;
    ensure!(made.iter().any(|line| line.contains("kmsg") && line.contains("0x10b")), "{made:?}");
    counter().counts(&pair.b, 3)?;
    pair.finish(NAME)
}

#[test]
fn a_snapshot_of_what_came_with_its_root_is_refused_by_name() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    let saved = |name: &str| pair.directory().join(name).display().to_string();
    pair.a.migctl(&["checkpoint", NAME, "--to", &saved("one")])?.ok()?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    let refused = pair.b.migctl(&["checkpoint", NAME, "--to", &saved("two")])?;
    refused.expect(1, &["snapshots do not hold root file systems"])?;
    counter().counts(&pair.b, 3)?;
    pair.finish(NAME)
}

#[test]
fn a_daemon_that_starts_anew_has_its_containers_root_and_nothing_that_was_begun() -> Result<()> {
    let (mut pair, bundle) = apart()?;
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    moves(&pair.a, &pair.b, NAME, &[])?;
    let root = rootfs_at(&pair.b)?;
    let begun = pair.b.state_dir().join("rootfs/6ba7b810-9dad-41d1-80b4-00c04fd430c8/root/a");
    fs::create_dir_all(&begun)?;
    pair.b.kill()?;
    pair.b.restart()?;
    counter().counts(&pair.b, 3)?;
    ensure!(rootfs_at(&pair.b)? == root && written(&root)? > 1, "it has another root");
    ensure!(!begun.exists(), "what was begun is still there");
    moves(&pair.b, &pair.a, NAME, &[])?;
    counter().counts(&pair.a, 3)?;
    pair.finish(NAME)
}

/// One daemon is killed where it stands at `point`, and comes back: exactly one host
/// runs the container then, with its root file system, and the other has nothing of it.
fn crash(point: &str, at_source: bool) -> Result<()> {
    let (mut pair, bundle) = apart()?;
    let source_halts = point.starts_with("source");
    let halting = if source_halts { &mut pair.a } else { &mut pair.b };
    halting.halt_at(Some(point));
    start(&mut pair)?;
    run(&bundle, &pair.a, &[])?;
    let moving = start_moving(&pair.a, &pair.b.to(), NAME)?;
    let halted = if source_halts { &mut pair.a } else { &mut pair.b };
    halted.wait_halted()?;
    halted.kill()?;
    halted.restart()?;
    drop(moving);
    let found = pair.runs_at_a(NAME)?;
    ensure!(at_source == found, "at the source: {found}");
    let (here, elsewhere) = if found { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    let before = counter().counts(here, 5)?;
    ensure!(written(&rootfs_at(here)?)? >= before, "what it wrote is not there");
    leaks::expect_nothing_left(elsewhere)?;
    moves(here, elsewhere, NAME, &[])?;
    counter().counts(elsewhere, 5)?;
    ensure!(written(&rootfs_at(elsewhere)?)? >= before, "what it wrote is not there");
    pair.finish(NAME)
}

integration::tests_of! {
    crash:
    a_source_killed_while_files_go_leaves_nothing_elsewhere("source-files-chunk", true);
    a_source_killed_while_it_stands_still_leaves_nothing_elsewhere("source-frozen", true);
    a_source_killed_after_released_leaves_one_root_file_system("source-released", false);
    a_destination_killed_with_an_empty_root_leaves_nothing("destination-accepted", true);
    a_destination_killed_before_the_root_is_whole_leaves_nothing("destination-loading", true);
    a_destination_killed_with_the_root_whole_leaves_one("destination-sealed", true);
    a_destination_killed_when_it_owns_the_container_has_its_root("destination-owned", false);
}
