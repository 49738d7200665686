//! `logs`: serial output, wherever the workload runs.

use migr_proto::v1::LogsRequest;

use super::Context;
use crate::args::LogsArgs;
use crate::client::Client;
use crate::failure::{Failure, exit};
use crate::follow::{Ended, Printer, Trail, opened, received};

pub async fn run(ctx: &Context, args: LogsArgs) -> Result<u8, Failure> {
    let doing = format!("cannot read the log of {}", args.name);
    let mut printer = Printer::new(ctx.format, args.timestamps, Some(0));
    let mut trail = Trail::new(&args.name, &ctx.host);
    let mut patient = false;
    loop {
        let (client, mut chunks) = opened(patient, async || {
            let client = Client::connect(trail.address(), &doing).await?;
            let request = LogsRequest {
                name: args.name.clone(),
                follow: args.follow,
                from_offset: printer.next().unwrap_or(0),
            };
            match client.rpc().logs(request).await {
                Ok(reply) => Ok((client, reply.into_inner())),
                Err(status) => Err(client.explain(&doing, &status)),
            }
        })
        .await?;
        let mut printed = false;
        let ended = loop {
            match received(&client, &doing, chunks.message().await)? {
                Err(ended) => break ended,
                Ok(chunk) => {
                    printed |= printer.print(&chunk)?;
                    if !chunk.moved_to.is_empty() {
                        break Ended::MovedTo(chunk.moved_to);
                    }
                }
            }
        };
        match ended {
            Ended::Finished => return Ok(exit::DONE),
            Ended::MovedTo(address) => trail.go_on(Some(address), printed)?,
            Ended::Lost(error) if !args.follow => return Err(error.into()),
            Ended::Lost(_) => trail.go_on(None, printed)?,
        }
        printer.resume();
        patient = true;
    }
}
