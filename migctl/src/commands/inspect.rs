//! `inspect`: everything about one workload.

use migr_proto::v1::WorkloadName;

use super::Context;
use crate::args::NameArgs;
use crate::failure::{Failure, exit};
use crate::output::{human, json, print};

pub async fn run(ctx: &Context, args: NameArgs) -> Result<u8, Failure> {
    let doing = format!("cannot inspect {}", args.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().inspect(WorkloadName { name: args.name }).await;
    let reply = reply.map_err(|status| client.explain(&doing, &status))?;
    let inspection = json::Inspection::from(reply.into_inner());
    print(ctx.format, &inspection, || human::inspection(&inspection))?;
    Ok(exit::DONE)
}
