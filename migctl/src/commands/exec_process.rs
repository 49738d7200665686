//! `exec-process`: starts a command as a workload.

use migr_proto::v1;

use super::{Context, absolute};
use crate::args::{ExecProcessArgs, ProcessArgs, ProcessNet};
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: ExecProcessArgs) -> Result<u8, Failure> {
    let request = v1::ExecProcessRequest {
        name: args.name,
        argv: args.command,
        env: args.env,
        cwd: absolute(&args.cwd)?,
        net: args.net.map(net),
    };
    let doing = format!("cannot start {}", request.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().exec_process(request).await;
    ctx.workload(&client, &doing, reply)
}

pub(super) fn net(net: ProcessNet) -> v1::ProcessNet {
    let ProcessNet { address, bridge, gateway, mac } = net;
    v1::ProcessNet {
        address,
        bridge,
        gateway: gateway.map_or_else(String::new, |gateway| gateway.to_string()),
        mac: mac.map_or_else(Vec::new, |mac| mac.to_vec()).into(),
    }
}

/// What may be done to a process tree, for the daemon.
pub(super) fn options(args: ProcessArgs) -> v1::ProcessOptions {
    let ProcessArgs { file_locks, link_remap, ghost_limit, drop_connections } = args;
    let ghost_limit_bytes = ghost_limit.unwrap_or(0);
    v1::ProcessOptions { file_locks, link_remap, ghost_limit_bytes, drop_connections }
}
