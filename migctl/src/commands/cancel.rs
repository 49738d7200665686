//! `cancel`: asks a running migration to stop.

use migr_proto::v1::WorkloadName;

use super::Context;
use crate::args::NameArgs;
use crate::failure::{Failure, exit};
use crate::output::print;
use crate::units::plain;

pub async fn run(ctx: &Context, args: NameArgs) -> Result<u8, Failure> {
    let name = args.name;
    let doing = format!("cannot cancel the migration of {name}");
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().cancel(WorkloadName { name: name.clone() }).await;
    let reply = reply.map_err(|status| client.explain(&doing, &status))?.into_inner();
    let object = serde_json::json!({
        "workload": name, "migration_id": reply.migration_id, "cancelling": true,
    });
    print(ctx.format, &object, || {
        format!("cancelling migration {} of {}", plain(&reply.migration_id), plain(&name))
    })?;
    Ok(exit::DONE)
}
