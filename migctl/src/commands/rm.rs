//! `rm`: forgets a stopped workload.

use migr_proto::v1::WorkloadName;

use super::Context;
use crate::args::NameArgs;
use crate::failure::{Failure, exit};
use crate::output::print;
use crate::units::plain;

pub async fn run(ctx: &Context, args: NameArgs) -> Result<u8, Failure> {
    let name = args.name;
    let doing = format!("cannot remove {name}");
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().remove(WorkloadName { name: name.clone() }).await;
    reply.map_err(|status| client.explain(&doing, &status))?;
    let object = serde_json::json!({ "removed": name });
    print(ctx.format, &object, || format!("{} is removed", plain(&name)))?;
    Ok(exit::DONE)
}
