//! `stop`: has a workload end, or ends it.

use migr_proto::v1::StopRequest;

use super::Context;
use crate::args::StopArgs;
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: StopArgs) -> Result<u8, Failure> {
    let doing = format!("cannot stop {}", args.name);
    let client = ctx.connect(&doing).await?;
    let StopArgs { name, force, timeout } = args;
    let request = StopRequest { name, force, timeout_ms: timeout.unwrap_or(0) };
    let reply = client.rpc().stop(request).await;
    ctx.workload(&client, &doing, reply)
}
