//! `watch`: reports on a migration that somebody else started.

use migr_proto::v1::{MigrationMode, WorkloadKind, WorkloadName};

use super::Context;
use crate::args::NameArgs;
use crate::failure::Failure;
use crate::output::json::{Migration, kind, mode};
use crate::track::{Interrupt, Tracker};

pub async fn run(ctx: &Context, args: NameArgs) -> Result<u8, Failure> {
    let doing = format!("cannot watch {}", args.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().watch(WorkloadName { name: args.name.clone() }).await;
    let stream = reply.map_err(|status| client.explain(&doing, &status))?.into_inner();
    let known = Migration {
        workload: args.name,
        kind: kind(WorkloadKind::Unspecified),
        mode: mode(MigrationMode::Unspecified),
        source: ctx.host.clone(),
        ..Migration::default()
    };
    Tracker::new(ctx, client, known, Interrupt::Detaches).run(Some(stream)).await
}
