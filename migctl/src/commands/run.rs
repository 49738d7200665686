//! `run`: creates a VM and starts it.

use migr_proto::v1::{DiskOrder, NetOrder, RunRequest};

use super::{Context, absolute};
use crate::args::{Disk, Net, RunArgs};
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: RunArgs) -> Result<u8, Failure> {
    let request = RunRequest {
        kernel: absolute(&args.kernel)?,
        initrd: args.initrd.as_deref().map(absolute).transpose()?.unwrap_or_default(),
        cmdline: args.cmdline,
        memory_bytes: args.memory,
        cpus: args.cpus,
        disks: args.disks.iter().map(disk).collect::<Result<_, _>>()?,
        nets: args.nets.into_iter().map(net).collect(),
        cpu: None,
        name: args.name,
    };
    let doing = format!("cannot run {}", request.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().run(request).await;
    ctx.workload(&client, &doing, reply)
}

fn disk(disk: &Disk) -> Result<DiskOrder, Failure> {
    let Disk { path, read_only } = disk;
    Ok(DiskOrder { path: absolute(path)?, read_only: *read_only })
}

fn net(net: Net) -> NetOrder {
    let Net { tap, bridge, mac } = net;
    NetOrder { tap, bridge, mac: mac.map_or_else(Vec::new, |mac| mac.to_vec()).into() }
}
