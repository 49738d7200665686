//! `resume`: lets a paused workload go on.

use migr_proto::v1::WorkloadName;

use super::Context;
use crate::args::NameArgs;
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: NameArgs) -> Result<u8, Failure> {
    let doing = format!("cannot resume {}", args.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().resume(WorkloadName { name: args.name }).await;
    ctx.workload(&client, &doing, reply)
}
