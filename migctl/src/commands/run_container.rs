//! `run-container`: starts an OCI bundle as a workload.

use migr_proto::v1;

use super::exec_process::net;
use super::{Context, absolute};
use crate::args::{Rootfs, RunContainerArgs};
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: RunContainerArgs) -> Result<u8, Failure> {
    let rootfs = match args.rootfs {
        Rootfs::Shared => v1::RootfsCarrying::Shared,
        Rootfs::Copy => v1::RootfsCarrying::Copy,
    };
    let request = v1::RunContainerRequest {
        name: args.name,
        bundle: absolute(&args.bundle)?,
        rootfs: rootfs.into(),
        net: args.net.map(net),
    };
    let doing = format!("cannot start {}", request.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().run_container(request).await;
    ctx.workload(&client, &doing, reply)
}
