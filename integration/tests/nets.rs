//! Taps and bridges, with whole daemons in a network namespace of the test's.
//!
//! Both daemons share the namespace, so a VM's tap is always in use at the
//! destination: that a VM with a tap moves is shown in the lab.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration::daemon::Daemon;
use integration::host_pair::HostPair;
use integration::migctl::Ran;
use nix::sched::{CloneFlags, unshare};

const NAME: &str = "pulse";
const MAC: &str = "02:00:00:00:00:07";

/// Runs `test` where nobody else's interfaces are. What it starts is there too.
fn in_own_network(test: fn() -> Result<()>) -> Result<()> {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).context("run the tests as root")?;
        ip("link set lo up")?;
        test()
    });
    thread.join().expect("the test does not panic")
}

fn ip(args: &str) -> Result<String> {
    let ran = Command::new("ip").args(args.split(' ')).output().context("install iproute2")?;
    ensure!(ran.status.success(), "ip {args}: {}", String::from_utf8_lossy(&ran.stderr));
    Ok(String::from_utf8(ran.stdout)?)
}

fn run(pair: &HostPair, name: &str, nets: &[&str]) -> Result<Ran> {
    let kernel = pair.kernel().display().to_string();
    let mut args = vec!["run", name, "--kernel", &kernel, "--memory", "64M", "--cmdline", "hot=1M"];
    for net in nets {
        args.extend(["--net", *net]);
    }
    pair.a.migctl(&args)
}

/// The codes of what a dry run finds in the way.
fn blockers(from: &Daemon, to: &Daemon) -> Result<Vec<String>> {
    let to = to.to();
    let plan = from.migctl(&["-o", "json", "migrate", NAME, "--to", &to, "--dry-run"])?;
    ensure!(plan.status == 3, "{}: {}{}", plan.command, plan.stdout, plan.stderr);
    let plan = plan.json()?;
    let found = plan["blockers"].as_array().context("no blockers")?;
    Ok(found.iter().filter_map(|b| b["code"].as_str()).map(ToOwned::to_owned).collect())
}

#[test]
fn a_vm_has_its_taps_as_long_as_it_lives() -> Result<()> {
    in_own_network(|| {
        let pair = HostPair::start()?;
        run(&pair, NAME, &["tap=tap0"])?.expect(1, &["there is no tap tap0", "ip tuntap add"])?;
        run(&pair, NAME, &["bridge=br0"])?.expect(1, &["there is no bridge br0"])?;
        run(&pair, NAME, &["tap=lo"])?.expect(1, &["the interface lo is no tap"])?;
        run(&pair, NAME, &["tap=a/b"])?.expect(1, &["can't be an interface"])?;
        ip("tuntap add dev tap0 mode tap")?;
        ip("link add br0 type bridge")?;
        run(&pair, NAME, &[&format!("tap=tap0,mac={MAC}"), "bridge=br0"])?.ok()?;
        let told = pair.a.migctl(&["-o", "json", "inspect", NAME])?.ok()?.json()?;
        ensure!(told["nets"][0]["tap"] == "tap0" && told["nets"][0]["mac"] == MAC, "{told}");
        let made = told["nets"][1]["tap"].as_str().context("no name")?.to_owned();
        ensure!(ip(&format!("-o link show {made}"))?.contains("master br0"));
        let of_whom = format!("{NAME} has the tap tap0");
        run(&pair, "other", &["tap=tap0"])?.expect(1, &["ADDRESS_TAKEN", &of_whom])?;
        let expected = ["destination-tap-busy", "destination-tap-busy"];
        ensure!(blockers(&pair.a, &pair.b)? == expected);
        pair.a.migctl(&["stop", NAME, "--force"])?.ok()?;
        let left = ip("-o link")?;
        ensure!(left.contains("tap0") && !left.contains(&made), "{left}");
        run(&pair, "other", &["tap=tap0"])?.ok()?;
        pair.a.migctl(&["stop", "other", "--force"])?.ok()?;
        pair.a.migctl(&["rm", "other"])?.ok()?;
        pair.finish(NAME)
    })
}

#[test]
fn a_bridge_that_the_destination_lacks_is_named_before_anything_is_touched() -> Result<()> {
    in_own_network(|| {
        let pair = HostPair::start()?;
        ip(&format!("link add br0 address {MAC} type bridge"))?;
        let taken = run(&pair, NAME, &[&format!("bridge=br0,mac={MAC}")])?;
        taken.expect(1, &["interface br0 has the hardware address", MAC, "another mac="])?;
        run(&pair, NAME, &["bridge=br0"])?.ok()?;
        ip("link del br0")?;
        ensure!(blockers(&pair.a, &pair.b)? == ["destination-bridge-missing"]);
        ensure!(pair.a.state_of(NAME)?.as_deref() == Some("running"));
        ensure!(pair.b.workloads()?.is_empty());
        pair.finish(NAME)
    })
}
