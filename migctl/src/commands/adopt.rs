//! `adopt`: makes a workload of a process that runs already, or with `--dry-run` says
//! what stands in the way of that.

use migr_proto::v1::AdoptRequest;

use super::Context;
use crate::args::AdoptArgs;
use crate::failure::{Failure, exit};
use crate::output::{human, json, print};

pub async fn run(ctx: &Context, args: AdoptArgs) -> Result<u8, Failure> {
    let AdoptArgs { pid, name, ghost_limit, dry_run } = args;
    let ghost_limit_bytes = ghost_limit.unwrap_or(0);
    let request = AdoptRequest { name, pid, dry_run, ghost_limit_bytes };
    let doing = format!("cannot adopt process {pid}");
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().adopt(request).await;
    let reply = reply.map_err(|status| client.explain(&doing, &status))?.into_inner();
    if let Some(workload) = reply.workload {
        let workload = json::Workload::from(workload);
        let object = serde_json::json!({ "workload": workload });
        print(ctx.format, &object, || human::workload(&workload))?;
        return Ok(exit::DONE);
    }
    let blockers: Vec<_> = reply.blockers.into_iter().map(Into::into).collect();
    let plan = json::AdoptPlan { pid, possible: blockers.is_empty(), blockers };
    print(ctx.format, &plan, || human::adopt_plan(&plan))?;
    Ok(if plan.possible { exit::DONE } else { exit::REFUSED })
}
