//! What users get wrong, and what they are told. Nothing is left afterwards.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use anyhow::{Context, Result, ensure};
use integration::daemon::{Daemon, free_address};
use integration::host_pair::HostPair;
use integration::leaks::{self, expect_nothing_left};
use integration::scenario::{Pulse, expect_alive};

/// `run` with these arguments is refused with `words`, and leaves nothing.
fn run_refused(host: &Daemon, args: &[&str], words: &[&str]) -> Result<()> {
    let args = [&["run"], args].concat();
    let ran = host.migctl(&args)?;
    ran.expect(1, words)?;
    expect_nothing_left(host)
}

#[test]
fn a_kernel_that_is_not_there_is_named() -> Result<()> {
    let pair = HostPair::start()?;
    let args = ["vm", "--kernel", "/nonexistent/vmlinux", "--memory", "64M"];
    run_refused(&pair.a, &args, &["/nonexistent/vmlinux", "no such file"])
}

#[test]
fn a_kernel_that_is_a_directory_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let path = pair.directory().display().to_string();
    run_refused(&pair.a, &["vm", "--kernel", &path, "--memory", "64M"], &[&path])
}

#[test]
fn a_file_that_is_no_kernel_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    for (name, bytes) in [("text", &b"hello, I am no kernel\n"[..]), ("empty", b"")] {
        let path = pair.directory().join(name);
        fs::write(&path, bytes)?;
        let path = path.display().to_string();
        run_refused(&pair.a, &["vm", "--kernel", &path, "--memory", "64M"], &["ELF", "bzImage"])?;
    }
    Ok(())
}

#[test]
fn a_truncated_kernel_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    for length in [20, 64, 200, 5000] {
        let path = pair.directory().join("short.elf");
        fs::write(&path, &pulse::ELF[..length])?;
        let path = path.display().to_string();
        run_refused(&pair.a, &["vm", "--kernel", &path, "--memory", "64M"], &["kernel"])?;
    }
    Ok(())
}

#[test]
fn a_kernel_that_loads_outside_memory_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let path = pair.directory().join("far.elf");
    let mut image = pulse::ELF.to_vec();
    move_first_segment(&mut image, 0x7000_0000)?;
    fs::write(&path, image)?;
    let path = path.display().to_string();
    run_refused(
        &pair.a,
        &["vm", "--kernel", &path, "--memory", "64M"],
        &["0x70000000", "RAM", "give it more memory"],
    )
}

/// Makes the first loadable segment of a 64-bit ELF load at `to`.
fn move_first_segment(image: &mut [u8], to: u64) -> Result<()> {
    let word = |image: &[u8], at: usize| -> Result<u64> {
        let bytes = image.get(at..at + 8).context("a short image")?;
        Ok(u64::from_le_bytes(bytes.try_into()?))
    };
    let headers = usize::try_from(word(image, 32)?)?;
    let count = usize::from(u16::from_le_bytes([image[56], image[57]]));
    for header in (0..count).map(|i| headers + i * 56) {
        if image[header..header + 4] == [1, 0, 0, 0] {
            image[header + 24..header + 32].copy_from_slice(&to.to_le_bytes());
            return Ok(());
        }
    }
    anyhow::bail!("no loadable segment")
}

#[test]
fn memory_of_an_impossible_size_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let kernel = pair.kernel().display().to_string();
    let run = |memory| ["vm", "--kernel", &kernel, "--memory", memory].map(str::to_owned);
    for (memory, words) in [
        ("67108865", &["multiple of 4096"][..]),
        ("0", &["memory"]),
        ("1T", &["memory", "free"]),
        ("8191P", &["memory"]),
    ] {
        let args = run(memory);
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let ran = pair.a.migctl(&[&["run"], &args[..]].concat())?;
        ensure!(ran.status == 1 || ran.status == 2, "{}: status {}", ran.command, ran.status);
        ran.expect(ran.status, words)?;
    }
    expect_nothing_left(&pair.a)
}

#[test]
fn too_little_memory_for_the_kernel_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let kernel = pair.kernel().display().to_string();
    run_refused(&pair.a, &["vm", "--kernel", &kernel, "--memory", "64K"], &["memory"])
}

#[test]
fn a_number_of_cpus_that_kvm_does_not_have_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let kernel = pair.kernel().display().to_string();
    let args = ["vm", "--kernel", &kernel, "--memory", "64M", "--cpus", "100000"];
    run_refused(&pair.a, &args, &["cpu"])
}

#[test]
fn names_that_are_taken_or_can_not_be_names_are_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let kernel = pair.kernel().display().to_string();
    let long = "x".repeat(64);
    for (name, word) in [
        (pulse.name, "already"),
        ("../etc", "name"),
        ("a/b", "name"),
        ("", "name"),
        ("white space", "name"),
        (".hidden", "name"),
        (&long, "name"),
        ("ünïcode", "name"),
    ] {
        let args = ["run", name, "--kernel", &kernel, "--memory", "64M"];
        pair.a.migctl(&args)?.expect(1, &[word])?;
    }
    ensure!(leaks::vm_processes(pair.a.state_dir()).len() == 1);
    expect_alive(&pair.a, pulse.name, 3)?;
    pair.finish(pulse.name)
}

#[test]
fn a_workload_that_nobody_has_is_said_to_be_unknown() -> Result<()> {
    let pair = HostPair::start()?;
    let to = pair.b.to();
    for args in [
        &["inspect", "nobody"][..],
        &["logs", "nobody"],
        &["pause", "nobody"],
        &["stop", "nobody"],
        &["rm", "nobody"],
        &["cancel", "nobody"],
        &["watch", "nobody"],
    ] {
        let ran = pair.a.migctl(args)?;
        ensure!(ran.status != 0, "{} succeeded", ran.command);
        ran.expect(ran.status, &["nobody", "no workload"])?;
    }
    pair.a.migctl(&["migrate", "nobody", "--to", &to])?.expect(3, &["nobody", "no workload"])
}

/// Moving to `to` is refused with `words`; the guest does not notice.
fn move_refused(to: &str, words: &[&str]) -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let words = [words, &[to, "planning"]].concat();
    pair.a.migctl(&["migrate", pulse.name, "--to", to])?.expect(3, &words)?;
    let dry = pair.a.migctl(&["-o", "json", "migrate", pulse.name, "--to", to, "--dry-run"])?;
    ensure!(dry.status == 3, "{}: status {}", dry.command, dry.status);
    ensure!(dry.json()?["possible"] == false, "{}", dry.stdout);
    expect_alive(&pair.a, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn a_peer_that_does_not_listen_is_unreachable() -> Result<()> {
    move_refused(&free_address()?.to_string(), &["check the address"])
}

#[test]
fn a_peer_whose_name_does_not_resolve_is_unreachable() -> Result<()> {
    move_refused("no-such-host.invalid:7070", &["check the address"])
}

#[test]
fn an_address_that_is_none_is_wrong_usage() -> Result<()> {
    let pair = HostPair::start()?;
    for to in ["", "host", "host:", "host:0x10", "host:70700", ":::"] {
        pair.a.migctl(&["migrate", "vm", "--to", to])?.expect(2, &["--to"])?;
    }
    Ok(())
}

/// Something that is no migrd: reads a little and answers `answer`.
fn stranger(answer: &'static [u8]) -> Result<SocketAddr> {
    let listener = TcpListener::bind(free_address()?)?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            // The client may be gone already.
            let _ = client.read(&mut [0; 1024]);
            let _ = client.write_all(answer);
        }
    });
    Ok(address)
}

#[test]
fn a_peer_that_is_a_web_server_is_no_migrd() -> Result<()> {
    let to = stranger(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")?;
    move_refused(&to.to_string(), &["migrd"])
}

#[test]
fn a_peer_that_closes_every_connection_is_no_migrd() -> Result<()> {
    move_refused(&stranger(b"")?.to_string(), &["migrd"])
}

#[test]
fn a_vm_can_not_be_moved_to_where_it_is() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.a.to();
    let ran = pair.a.migctl(&["migrate", pulse.name, "--to", &to])?;
    ran.expect(3, &["this very migrd"])?;
    expect_alive(&pair.a, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn modes_that_this_daemon_does_not_have_are_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    for (mode, why) in [("postcopy", "before it runs"), ("hybrid", "combine rounds")] {
        let ran = pair.a.migctl(&["migrate", pulse.name, "--to", &to, "--mode", mode])?;
        ran.expect(3, &[why, "use --mode"])?;
    }
    expect_alive(&pair.a, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn a_destination_without_enough_memory_refuses_and_says_how_much_it_has() -> Result<()> {
    let pair = HostPair::start()?;
    let hosts = pair.b.ask(&["hosts"])?;
    let free = hosts["hosts"][0]["memory_free_bytes"].as_u64().context("no free memory")? >> 20;
    // The daemons do not know of each other's promises.
    let half = u32::try_from(free / 2)?;
    let big = Pulse { name: "big", memory: half + half / 2, filled: 1, ..Pulse::small() };
    let pulse = Pulse { memory: half, filled: 1, ..Pulse::small() };
    big.run(&pair, &pair.b)?;
    pulse.run(&pair, &pair.a)?;
    let to = pair.b.to();
    let ran = pair.a.migctl(&["migrate", pulse.name, "--to", &to])?;
    ran.expect(3, &["memory", "free", &to])?;
    expect_alive(&pair.a, pulse.name, 3)?;
    expect_alive(&pair.b, big.name, 3)?;
    pair.b.migctl(&["stop", big.name, "--force"])?.ok()?;
    pair.b.migctl(&["rm", big.name])?.ok()?;
    // Its promise went with it.
    pair.there(pulse.name, &[])?;
    expect_alive(&pair.b, pulse.name, 3)?;
    pair.finish(pulse.name)
}

#[test]
fn a_name_that_is_taken_at_the_destination_refuses_the_move() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    pulse.run(&pair, &pair.b)?;
    let to = pair.b.to();
    pair.a
        .migctl(&["migrate", pulse.name, "--to", &to])?
        .expect(3, &["another workload named pulse", &to])?;
    expect_alive(&pair.a, pulse.name, 3)?;
    expect_alive(&pair.b, pulse.name, 3)?;
    pair.finish(pulse.name)
}

#[test]
fn a_snapshot_that_is_none_or_is_damaged_is_refused() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let directory = pair.directory().join("snapshot");
    let path = directory.display().to_string();
    pair.b.migctl(&["restore", "--from", &path])?.expect(1, &[&path])?;
    pair.a.migctl(&["checkpoint", pulse.name, "--to", &path])?.ok()?;
    for file in leaks::files_below(&directory) {
        let file = directory.join(file);
        let whole = fs::read(&file)?;
        fs::write(&file, &whole[..whole.len() / 2])?;
        let ran = pair.b.migctl(&["restore", "--from", &path, "--name", "copy"])?;
        ensure!(ran.status == 1, "half of {} was enough: {}", file.display(), ran.stdout);
        let mut changed = whole.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        fs::write(&file, changed)?;
        let ran = pair.b.migctl(&["restore", "--from", &path, "--name", "copy"])?;
        ensure!(ran.status == 1, "{} was changed, unnoticed: {}", file.display(), ran.stdout);
        fs::write(&file, whole)?;
    }
    expect_nothing_left(&pair.b)?;
    pair.b.migctl(&["restore", "--from", &path, "--name", "copy"])?.ok()?;
    pair.b.migctl(&["stop", "copy", "--force"])?.ok()?;
    pair.b.migctl(&["rm", "copy"])?.ok()?;
    pair.finish(pulse.name)
}

/// A pipe that nobody writes into must not hold up the daemon, nor anybody
/// else that it serves.
#[test]
fn a_kernel_that_is_a_pipe_is_refused_at_once() -> Result<()> {
    let pair = HostPair::start()?;
    let path = pair.directory().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
    let path = path.display().to_string();
    run_refused(&pair.a, &["vm", "--kernel", &path, "--memory", "64M"], &["not a file"])
}
