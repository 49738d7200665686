//! A container moves between hosts whose kernels track memory: with a root file system
//! that travels, a connection, and memory that goes ahead.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::table::{Table, figure};
use super::trees::{
    Client, DIRTY, PORT, SERVER, ends, figures, is_whole, moved, pages_bytes, place, save,
};
use crate::lab::Lab;
use crate::lab::host::{Host, tail};
use crate::lab::layout::{BRIDGE, DISK, SHARED};
use crate::process::PYTHON;
use crate::process::container::{Bundle, NAME, spec};

const ADDRESS: &str = "10.99.0.61";
/// So much memory is worth to be sent ahead (MiB); and what of it is written each second,
/// in pages.
const MEMORY: u32 = 64;
const RATE: u32 = 160;
/// Blocks of memory that its server has, of which each answer has some checked.
const BLOCKS: u32 = 128;
/// What the container may have, in bytes.
const LIMIT: u64 = 256 << 20;

/// Makes the bundle of a container with two processes: one serves, and one holds memory.
/// Python is the host's, everything else is in its root file system.
fn make_bundle(lab: &Lab, home: &Host) -> Result<String> {
    let bundle = Bundle::make(lab.shared())?;
    let root = bundle.rootfs();
    fs::create_dir(root.join("usr"))?;
    for name in ["lib", "lib64"] {
        symlink(format!("usr/{name}"), root.join(name))?;
    }
    fs::write(root.join("server.py"), SERVER)?;
    fs::write(root.join("dirty.py"), DIRTY)?;
    let server = format!("{PYTHON} /server.py {PORT} {BLOCKS}");
    let program = format!("{server} & exec {PYTHON} /dirty.py {MEMORY} {RATE}");
    let mut spec = spec(&program);
    spec["root"]["readonly"] = json!(false);
    spec["linux"]["resources"] = json!({"memory": {"limit": LIMIT}});
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    mounts.retain(|mount| mount["destination"] != "/data");
    mounts.push(json!({"destination": "/usr", "type": "bind", "source": "/usr",
                       "options": ["rbind", "ro"]}));
    bundle.write(&spec)?;
    // What is shared notes no changes, and would be sent when the container stands still.
    home.sh(&format!("cp -a {SHARED}/bundle {DISK}/bundle && rm -r {SHARED}/bundle"))?;
    Ok(format!("{DISK}/bundle"))
}

/// Two snapshots of it build on each other. It moves, which sends its memory ahead
/// unasked, and a client in a host keeps its connection. Then it is made anew of both
/// snapshots.
///
/// # Errors
/// When anything is not as if it had never moved.
pub(super) fn goes_ahead(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1)?, lab.host(2)?);
    let bundle = make_bundle(lab, one)?;
    let net = format!("ip={ADDRESS}/24,bridge={BRIDGE}");
    let words = ["run-container", NAME, "--bundle", &bundle, "--rootfs", "copy", "--net", &net];
    one.migctl(&words)?.ok()?;
    for said in ["listening", "beat 20"] {
        one.wait_for_output(NAME, said)?;
    }
    save(one, NAME, "container-1", None)?.ok()?;
    is_whole(one, NAME)?;
    save(one, NAME, "container-2", Some("container-1"))?.ok()?;
    let (all, changed) = (pages_bytes(one, "container-1")?, pages_bytes(one, "container-2")?);
    println!("images of a container's memory: {all}, then {changed} bytes");
    ensure!(changed < all / 2, "{all}, then {changed} bytes");
    moves_with_a_connection(one, two)?;
    ends(two, NAME)?;
    one.migctl(&["restore", "--from", &place("container-2"), "--name", "again"])?.ok()?;
    is_whole(one, "again")?;
    ends(one, "again")?;
    one.sh(&format!("rm -r {} {} {bundle}", place("container-1"), place("container-2")))?;
    Ok(())
}

fn moves_with_a_connection(one: &Host, two: &Host) -> Result<()> {
    let client = Client::start(two, ADDRESS)?;
    let report = moved(NAME, one, two, &["--verify"])?;
    ensure!(report["kind"] == "container" && report["verified"] == true, "{report}");
    ensure!(report["mode"] == "precopy", "precopy was not chosen: {report}");
    ensure!(report["rounds"].as_array().is_some_and(|rounds| !rounds.is_empty()), "{report}");
    is_whole(two, NAME)?;
    client.goes_on()?;
    client.finish()?;
    let said = two.wait_for_output(NAME, "ended")?;
    ensure!(!said.contains("WRONG"), "it says\n{}", tail(&said, 5));
    ensure!(said.matches("accepted").count() == 1, "more than one connection:\n{said}");
    let columns = ["mode", "total ms", "downtime ms", "rounds, MiB"];
    let mut table = Table::new("A container with a connection", &columns);
    table.row(&[
        "precopy".to_owned(),
        figure(&report, "total_ms"),
        figure(&report, "downtime_ms"),
        figures(&report, "bytes", f64::from(1 << 20)),
    ]);
    table.print();
    Ok(())
}
