//! `run`: creates a VM and starts it.

use migr_proto::v1::RunRequest;

use super::{Context, absolute};
use crate::args::RunArgs;
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: RunArgs) -> Result<u8, Failure> {
    let request = RunRequest {
        kernel: absolute(&args.kernel)?,
        initrd: args.initrd.as_deref().map(absolute).transpose()?.unwrap_or_default(),
        cmdline: args.cmdline,
        memory_bytes: args.memory,
        cpus: args.cpus,
        disks: Vec::new(),
        nets: Vec::new(),
        cpu: None,
        name: args.name,
    };
    let doing = format!("cannot run {}", request.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().run(request).await;
    ctx.workload(&client, &doing, reply)
}
