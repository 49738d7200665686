//! `pause`: stands a workload's CPUs still.

use migr_proto::v1::WorkloadName;

use super::Context;
use crate::args::NameArgs;
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: NameArgs) -> Result<u8, Failure> {
    let doing = format!("cannot pause {}", args.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().pause(WorkloadName { name: args.name }).await;
    ctx.workload(&client, &doing, reply)
}
