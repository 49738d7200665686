//! `restore`: starts a VM from a snapshot.

use migr_proto::v1::RestoreRequest;

use super::{Context, absolute};
use crate::args::RestoreArgs;
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: RestoreArgs) -> Result<u8, Failure> {
    let directory = absolute(&args.from)?;
    let doing = format!("cannot restore from {directory}");
    let client = ctx.connect(&doing).await?;
    let request = RestoreRequest { directory, name: args.name.unwrap_or_default() };
    let reply = client.rpc().restore(request).await;
    ctx.workload(&client, &doing, reply)
}
