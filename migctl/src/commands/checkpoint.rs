//! `checkpoint`: writes a snapshot of a VM.

use migr_proto::v1::CheckpointRequest;

use super::{Context, absolute};
use crate::args::CheckpointArgs;
use crate::failure::{Failure, exit};
use crate::output::print;
use crate::units::{plain, show_bytes, show_ms};

pub async fn run(ctx: &Context, args: CheckpointArgs) -> Result<u8, Failure> {
    let directory = absolute(&args.to)?;
    let name = args.name;
    let doing = format!("cannot checkpoint {name}");
    let client = ctx.connect(&doing).await?;
    let request = CheckpointRequest { name: name.clone(), directory: directory.clone() };
    let reply = client.rpc().checkpoint(request).await;
    let reply = reply.map_err(|status| client.explain(&doing, &status))?.into_inner();
    let object = serde_json::json!({
        "workload": name,
        "directory": directory,
        "bytes_written": reply.bytes_written,
        "pages_written": reply.pages_written,
        "paused_ms": reply.paused_ms,
    });
    print(ctx.format, &object, || {
        format!(
            "{} is saved in {}: {} in {} pages, paused for {}",
            plain(&name),
            plain(&directory),
            show_bytes(reply.bytes_written),
            reply.pages_written,
            show_ms(reply.paused_ms)
        )
    })?;
    Ok(exit::DONE)
}
