//! `stop`: ends a workload.

use migr_proto::v1::StopRequest;

use super::Context;
use crate::args::StopArgs;
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: StopArgs) -> Result<u8, Failure> {
    let doing = format!("cannot stop {}", args.name);
    let client = ctx.connect(&doing).await?;
    let reply =
        client.rpc().stop(StopRequest { name: args.name, force: args.force, timeout_ms: 0 }).await;
    ctx.workload(&client, &doing, reply)
}
