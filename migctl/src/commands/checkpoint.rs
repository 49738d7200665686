//! `checkpoint`: writes a snapshot of a workload, or with `--dry-run` says what
//! stands in the way of that.

use migr_proto::v1::{CheckpointReply, CheckpointRequest};

use super::exec_process::options;
use super::{Context, absolute};
use crate::args::CheckpointArgs;
use crate::failure::{Failure, exit};
use crate::output::{human, json, print};
use crate::units::{plain, show_bytes, show_ms};

pub async fn run(ctx: &Context, args: CheckpointArgs) -> Result<u8, Failure> {
    let request = CheckpointRequest {
        directory: absolute(&args.to)?,
        name: args.name,
        dry_run: args.dry_run,
        process: Some(options(args.process)),
        stop: args.stop,
        parent: args.parent.as_deref().map(absolute).transpose()?.unwrap_or_default(),
    };
    let stop = request.stop;
    let (name, directory) = (request.name.clone(), request.directory.clone());
    let doing = format!("cannot checkpoint {name}");
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().checkpoint(request).await;
    let reply = reply.map_err(|status| client.explain(&doing, &status))?.into_inner();
    if args.dry_run {
        planned(ctx, name, directory, reply)
    } else {
        written(ctx, &name, &directory, stop, &reply)
    }
}

fn planned(
    ctx: &Context,
    workload: String,
    directory: String,
    reply: CheckpointReply,
) -> Result<u8, Failure> {
    let blockers: Vec<_> = reply.blockers.into_iter().map(Into::into).collect();
    let possible = blockers.is_empty();
    let plan = json::CheckpointPlan { workload, directory, possible, blockers };
    print(ctx.format, &plan, || human::checkpoint_plan(&plan))?;
    Ok(if possible { exit::DONE } else { exit::REFUSED })
}

fn written(
    ctx: &Context,
    name: &str,
    directory: &str,
    stopped: bool,
    reply: &CheckpointReply,
) -> Result<u8, Failure> {
    let object = serde_json::json!({
        "workload": name,
        "directory": directory,
        "bytes_written": reply.bytes_written,
        "pages_written": reply.pages_written,
        "paused_ms": reply.paused_ms,
        "stopped": stopped,
    });
    print(ctx.format, &object, || {
        format!(
            "{} is saved in {}{}: {} in {} pages, paused for {}",
            plain(name),
            plain(directory),
            if stopped { " and stopped" } else { "" },
            show_bytes(reply.bytes_written),
            reply.pages_written,
            show_ms(reply.paused_ms)
        )
    })?;
    Ok(exit::DONE)
}
