//! Established TCP connections of process trees that CRIU moves, between two hosts
//! with networks of their own: namespaces of this machine, joined by a cable.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use integration::daemon::Daemon;
use integration::host_pair::migrate;
use integration::process::served::{self, ADDRESS, Beside, Kind, NAME};
use integration::process::{PYTHON, can_move};
use integration::two_nets::{BRIDGE, Side, TwoNets, on_two_hosts};
use integration::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Answers a client must get before it is believed that its connection lives: more
/// than it has messages under way.
const SOME: u64 = 100;

/// Starts a Python program as a workload of host A.
fn run(nets: &TwoNets, net: &[&str], script: &str, args: &[&str]) -> Result<()> {
    let command = ["--", PYTHON, "-c", script];
    let args = [&["exec-process", NAME], net, &command, args].concat();
    nets.a.migctl(&args)?.ok().map(drop)
}

fn own_network() -> [String; 2] {
    served::own_network(ADDRESS)
}

fn hears(host: &Daemon, words: &str) -> Result<()> {
    wait::until(&format!("the workload to say {words:?}"), || {
        Ok(logs(host)?.contains(words).then_some(()))
    })
}

fn logs(host: &Daemon) -> Result<String> {
    Ok(host.migctl(&["logs", NAME])?.ok()?.stdout)
}

/// A server on host A, and a client on either host that it answers.
fn serve(nets: &TwoNets) -> Result<[Beside; 2]> {
    Kind::Process.serve(nets)?;
    let mut clients = served::clients(nets)?;
    for client in &mut clients {
        client.gets(SOME)?;
    }
    Ok(clients)
}

/// Moves the workload, as far as that goes.
fn go(nets: &TwoNets, from: Side, options: &[&str]) -> Result<integration::migctl::Ran> {
    let options = [&["--mode", "stop"], options].concat();
    migrate(nets.daemon(from), nets.daemon(from.other()), NAME, &options)
}

/// The codes of what a dry run from host A finds in the way.
fn blockers(nets: &TwoNets) -> Result<Vec<String>> {
    let plan = go(nets, Side::A, &["--dry-run"])?;
    ensure!(plan.status == 3, "{}: {}{}", plan.command, plan.stdout, plan.stderr);
    let plan = plan.json()?;
    let found = plan["blockers"].as_array().context("no blockers")?;
    Ok(found.iter().filter_map(|b| b["code"].as_str()).map(ToOwned::to_owned).collect())
}

/// Ends the clients, then the server, and checks that nothing stays.
fn finish(nets: &TwoNets, at: Side, clients: [Beside; 2]) -> Result<()> {
    served::finish(nets, at, clients).map(drop)
}

fn clear(nets: &TwoNets, at: Side) -> Result<()> {
    nets.remove(at, NAME)
}

#[test]
fn connections_live_on_through_ten_moves_of_their_server() -> Result<()> {
    on_two_hosts(|nets| {
        nets.start()?;
        let mut clients = serve(nets)?;
        for from in [Side::A, Side::B].into_iter().cycle().take(10) {
            go(nets, from, &[])?.ok()?;
            for client in &mut clients {
                client.gets(SOME)?;
            }
            nets.expect_nothing_left(from)?;
        }
        finish(nets, Side::A, clients)
    })
}

/// Connections of a crowd.
const CROWD: usize = 500;

#[test]
fn five_hundred_connections_move_there_and_back() -> Result<()> {
    on_two_hosts(|nets| {
        nets.start()?;
        can_move(&nets.a)?;
        Kind::Process.serve(nets)?;
        let mut crowd = Beside::crowd(nets, Side::B, CROWD)?;
        // Each of them has one message under way.
        let all = u64::try_from(CROWD)?;
        crowd.gets(2 * all)?;
        for from in [Side::A, Side::B] {
            go(nets, from, &[])?.ok()?;
            crowd.gets(2 * all)?;
            nets.expect_nothing_left(from)?;
        }
        served::finish(nets, Side::A, [crowd]).map(drop)
    })
}

#[test]
fn connections_over_ipv6_live_on() -> Result<()> {
    on_two_hosts(|nets| {
        nets.start()?;
        can_move(&nets.a)?;
        for (side, address) in [(Side::A, 1), (Side::B, 2)] {
            nets.ip(side, &format!("addr add fd98::{address}/64 dev {BRIDGE} nodad"))?;
        }
        let address = "fd98::50";
        let network = ["--net".to_owned(), format!("ip={address}/64,bridge={BRIDGE}")];
        Kind::Process.serve_at(nets, &network, "::", 128)?;
        let sides = [Side::A, Side::B];
        let clients = sides.map(|side| Beside::client_of(nets, side, address));
        let mut clients = clients.into_iter().collect::<Result<Vec<_>>>()?;
        for from in [Side::A, Side::B, Side::A] {
            for client in &mut clients {
                client.gets(SOME)?;
            }
            go(nets, from, &[])?.ok()?;
            nets.expect_nothing_left(from)?;
        }
        for client in &mut clients {
            client.gets(SOME)?;
        }
        served::finish(nets, Side::B, clients).map(drop)
    })
}

#[test]
fn a_server_whose_destination_dies_keeps_its_connections() -> Result<()> {
    on_two_hosts(|nets| {
        nets.b.halt_at(Some("destination-loading"));
        nets.start()?;
        let mut clients = serve(nets)?;
        let to = nets.b.to();
        let moving = nets.a.start_migctl(&["migrate", NAME, "--to", &to, "--mode", "stop"])?;
        nets.b.wait_halted()?;
        nets.b.restart()?;
        let moved = moving.wait()?;
        ensure!(moved.status != 0, "{}: {}", moved.command, moved.stdout);
        for client in &mut clients {
            client.gets(SOME)?;
        }
        nets.expect_nothing_left(Side::B)?;
        go(nets, Side::A, &[])?.ok()?;
        for client in &mut clients {
            client.gets(SOME)?;
        }
        finish(nets, Side::B, clients)
    })
}

/// The cable is pulled while the server stands still, and host A's daemon at `place`;
/// before, something else happens.
fn lose_each_other(
    nets: &mut TwoNets,
    place: &str,
    before: fn(&TwoNets) -> Result<()>,
) -> Result<()> {
    nets.a.halt_at(Some(place));
    nets.start()?;
    let mut clients = serve(nets)?;
    let to = nets.b.to();
    let moving = nets.a.start_migctl(&["migrate", NAME, "--to", &to, "--mode", "stop"])?;
    nets.a.wait_halted()?;
    before(nets)?;
    nets.connect(false)?;
    nets.a.go_on()?;
    let moved = moving.wait()?;
    ensure!(moved.status != 0, "{}: {}", moved.command, moved.stdout);
    // The other one is at the far end of the cable.
    clients[0].gets(SOME)?;
    nets.connect(true)?;
    clients[1].gets(SOME)?;
    nets.expect_nothing_left(Side::B)?;
    finish(nets, Side::A, clients)
}

#[test]
fn a_server_keeps_its_connections_when_the_hosts_lose_each_other_while_it_stands() -> Result<()> {
    on_two_hosts(|nets| lose_each_other(nets, "source-frozen", |_| Ok(())))
}

#[test]
fn a_server_keeps_its_connections_when_criu_is_killed_while_it_holds_them() -> Result<()> {
    on_two_hosts(|nets| lose_each_other(nets, "source-written", kill_criu))
}

/// Kills the CRIU of host A's one workload, once that is written and held.
fn kill_criu(nets: &TwoNets) -> Result<()> {
    let trees = nets.a.state_dir().display().to_string();
    let keeper = processes(|words| {
        words.get(1).is_some_and(|word| word == "process-keeper")
            && words.iter().any(|word| word.starts_with(&trees))
    })?;
    let [(keeper, words)] = &keeper[..] else { bail!("one keeper expected: {keeper:?}") };
    let cgroup = words.iter().skip_while(|word| *word != "--cgroup").nth(1);
    let frozen = Path::new(cgroup.context("no cgroup")?).join("cgroup.freeze");
    let mut held = 0;
    let criu = wait::until("CRIU to hold the processes", || {
        // While it works it calls itself so.
        let criu = processes(|words| words[0].starts_with("criu: dump"))?;
        let criu = criu.into_iter().find(|(pid, _)| parent(*pid).is_ok_and(|of| of == *keeper));
        let Some((criu, _)) = criu else { return Ok(None) };
        // It waits for a word, and not while it takes hold of them.
        let waits = fs::read_to_string(format!("/proc/{criu}/wchan"))?.contains("skb_wait");
        let frozen = fs::read_to_string(&frozen)?.trim() == "1";
        held = if waits && frozen { held + 1 } else { 0 };
        Ok((held > 5).then_some(criu))
    })?;
    Ok(kill(Pid::from_raw(criu), Signal::SIGKILL)?)
}

/// The processes of this machine whose command lines are such.
fn processes(such: impl Fn(&[String]) -> bool) -> Result<Vec<(i32, Vec<String>)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let words = line.split(|byte| *byte == 0);
        let words: Vec<_> = words.map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        if such(&words) {
            found.push((pid, words));
        }
    }
    Ok(found)
}

fn parent(pid: i32) -> Result<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').nth(1));
    Ok(rest.flatten().context("an odd stat")?.parse()?)
}

#[test]
fn a_connection_that_nobody_has_accepted_is_named_before_anything_stops() -> Result<()> {
    const SCRIPT: &str = "
import socket, sys
listener = socket.create_server(('0.0.0.0', 7000))
print('listening', flush=True)
sys.stdin.readline()
connection, _ = listener.accept()
print('accepted', flush=True)
while data := connection.recv(100):
    connection.sendall(data)
";
    const CALLER: &str = "
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000))
print('connected', flush=True)
sys.stdin.readline()
connection.sendall(b'still here?')
print(connection.recv(100).decode(), flush=True)
sys.stdin.read()
";
    on_two_hosts(|nets| {
        nets.start()?;
        let net = own_network();
        run(nets, &[&net[0], &net[1]], SCRIPT, &[])?;
        hears(&nets.a, "listening")?;
        let mut caller = Beside::start(nets, Side::B, CALLER, &[ADDRESS])?;
        wait::until("a connection", || Ok(caller.said()?.contains("connected").then_some(())))?;
        ensure!(blockers(nets)? == ["tcp-not-accepted"]);
        go(nets, Side::A, &[])?.expect(3, &["not accepted"])?;
        ensure!(nets.a.state_of(NAME)?.as_deref() == Some("running"));
        nets.expect_nothing_left(Side::B)?;

        let console = ["console", NAME, "--detach-after", "1s"];
        let address = nets.a.address();
        integration::migctl::Running::start(address, &console, Some("accept\n"))?.wait()?;
        hears(&nets.a, "accepted")?;
        go(nets, Side::A, &[])?.ok()?;
        let mut input = caller.input().context("no standard input")?;
        std::io::Write::write_all(&mut input, b"ask\n")?;
        wait::until("an answer", || Ok(caller.said()?.contains("still here?").then_some(())))?;
        // The server would end with its caller.
        clear(nets, Side::B)?;
        drop(input);
        Ok(())
    })
}

#[test]
fn a_connection_of_the_hosts_own_address_stays_behind_only_when_told_to() -> Result<()> {
    const SCRIPT: &str = "
import socket
connection = socket.create_connection(('10.98.0.2', 7001))
print('connected', flush=True)
try:
    print('closed', connection.recv(100), flush=True)
except OSError as error:
    print('closed', error, flush=True)
import time
time.sleep(10000)
";
    const LISTENER: &str = "
import socket, sys
listener = socket.create_server(('10.98.0.2', 7001))
print('listening', flush=True)
connection, _ = listener.accept()
print('accepted', flush=True)
try:
    print('closed', connection.recv(100), flush=True)
except OSError as error:
    print('closed', error, flush=True)
sys.stdin.read()
";
    on_two_hosts(|nets| {
        nets.start()?;
        let far = Beside::start(nets, Side::B, LISTENER, &[])?;
        let says = |word: &'static str| {
            let said = || Ok(far.said()?.contains(word).then_some(()));
            wait::until(&format!("the far end to say {word}"), said)
        };
        says("listening")?;
        run(nets, &[], SCRIPT, &[])?;
        hears(&nets.a, "connected")?;
        says("accepted")?;
        ensure!(blockers(nets)? == ["established-tcp"]);
        go(nets, Side::A, &[])?.expect(3, &["10.98.0.2:7001", "--drop-connections"])?;
        ensure!(nets.a.state_of(NAME)?.as_deref() == Some("running"));
        ensure!(!far.said()?.contains("closed") && !logs(&nets.a)?.contains("closed"));
        go(nets, Side::A, &["--drop-connections"])?.ok()?;
        hears(&nets.b, "closed")?;
        says("closed")?;
        clear(nets, Side::B)
    })
}

#[test]
fn a_destination_that_cannot_have_the_network_is_refused_by_name() -> Result<()> {
    const WAIT: &str = "import time; time.sleep(10000)";
    on_two_hosts(|nets| {
        nets.start()?;
        nets.ip(Side::A, "link add br1 type bridge")?;
        nets.ip(Side::A, "link set br1 up")?;
        run(nets, &["--net", "ip=10.98.0.51/24,bridge=br1"], WAIT, &[])?;
        ensure!(blockers(nets)? == ["destination-bridge-missing"]);
        go(nets, Side::A, &[])?.expect(3, &["bridge br1"])?;

        nets.ip(Side::B, "link add br1 type bridge")?;
        let other = ["exec-process", "other", "--net", "ip=10.98.0.51/24,bridge=br1", "--"];
        let other = [&other[..], &["/bin/sleep", "1000"]].concat();
        let taken = "has the address 10.98.0.51 in the bridge br1";
        nets.a.migctl(&other)?.expect(1, &[NAME, taken])?;
        nets.b.migctl(&other)?.ok()?;
        ensure!(blockers(nets)? == ["address-taken"]);
        go(nets, Side::A, &[])?.expect(3, &["other", taken])?;
        nets.b.migctl(&["stop", "other", "--force"])?.ok()?;
        // What has ended needs no address.
        go(nets, Side::A, &["--dry-run"])?.ok()?;
        nets.b.migctl(&["rm", "other"])?.ok()?;

        nets.ip(Side::B, &format!("addr add 10.98.0.51/24 dev {BRIDGE}"))?;
        ensure!(blockers(nets)? == ["destination-address-taken"]);
        go(nets, Side::A, &[])?.expect(3, &["10.98.0.51", BRIDGE])?;
        ensure!(nets.a.state_of(NAME)?.as_deref() == Some("running"));
        nets.expect_nothing_left(Side::B)?;

        nets.ip(Side::B, &format!("addr del 10.98.0.51/24 dev {BRIDGE}"))?;
        let told = nets.a.ask(&["inspect", NAME])?;
        let mac = told["process"]["net"]["mac"].as_str().context("no hardware address")?;
        nets.ip(Side::B, &format!("link set br1 address {mac}"))?;
        ensure!(blockers(nets)? == ["destination-address-taken"]);
        go(nets, Side::A, &[])?.expect(3, &["br1 has the hardware address", mac])?;
        nets.ip(Side::B, "link set br1 address 02:00:00:00:00:99")?;
        go(nets, Side::A, &[])?.ok()?;
        clear(nets, Side::B)
    })
}
