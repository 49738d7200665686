//! `list`: the workloads of a host.

use migr_proto::v1::ListRequest;

use super::Context;
use crate::args::ListArgs;
use crate::failure::{Failure, exit};
use crate::output::{human, json, print};

pub async fn run(ctx: &Context, args: &ListArgs) -> Result<u8, Failure> {
    let doing = "cannot list workloads";
    let client = ctx.connect(doing).await?;
    let reply = client.rpc().list(ListRequest { include_gone: args.all }).await;
    let reply = reply.map_err(|status| client.explain(doing, &status))?.into_inner();
    let mut workloads: Vec<json::Workload> = reply.workloads.into_iter().map(Into::into).collect();
    workloads.sort_by(|a, b| (&a.name, a.epoch).cmp(&(&b.name, b.epoch)));
    let object = serde_json::json!({ "workloads": workloads });
    print(ctx.format, &object, || human::workloads(&workloads))?;
    Ok(exit::DONE)
}
