//! Builds the guest image with the compiler that builds the workspace. The guest is freestanding,
//! so all it takes from the installed target is `core`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=guest");
    let target = variable("TARGET")?;
    if !target.starts_with("x86_64-") {
        return Err(format!("the pulse guest is x86-64 code: it cannot be built for {target}"));
    }
    let guest = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("guest");
    let image = PathBuf::from(variable("OUT_DIR")?).join("pulse.elf");
    let mut script = std::ffi::OsString::from("-Clink-arg=-Wl,-T,");
    script.push(guest.join("image.ld"));

    let mut rustc = Command::new(variable("RUSTC")?);
    rustc
        .args(["--edition=2024", "--crate-name=pulse_guest", "--crate-type=bin"])
        .args(["--target", &target])
        .args(["-Copt-level=3", "-Cpanic=abort", "-Crelocation-model=static", "-Cstrip=debuginfo"])
        .args(["-Ccodegen-units=1", "-Coverflow-checks=no"])
        // No C runtime and no library: the entry point is the PVH note's.
        .args(["-Clink-arg=-nostdlib", "-Clink-arg=-nostartfiles", "-Clink-arg=-static"])
        .args(["-Clink-arg=-Wl,--build-id=none", "-Clink-arg=-no-pie"])
        .arg(script)
        .arg("-o")
        .arg(&image)
        .arg(guest.join("main.rs"));
    let output = rustc.output().map_err(|error| format!("cannot start {rustc:?}: {error}"))?;
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::warning={line}");
    }
    if !output.status.success() {
        let status = output.status;
        return Err(format!("the pulse guest does not build ({status}); the reasons are above"));
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set: run this through cargo"))
}
