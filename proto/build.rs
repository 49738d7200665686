//! Compiles the `.proto` files with protox, so that no `protoc` binary is needed.

use std::{env, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 6] = [
    "migr/v1/control.proto",
    "migr/v1/peer.proto",
    "migr/v1/lanes.proto",
    "migr/v1/state.proto",
    "migr/v1/child.proto",
    "migr/v1/keeper.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("migr.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".migr.v1").compile_fds(descriptors)?;
    Ok(())
}
