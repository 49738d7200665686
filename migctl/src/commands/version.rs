//! `version`: of migctl, and of the daemon if it answers.

use migr_proto::v1::{HostReply, HostRequest};

use super::Context;
use crate::client::ClientError;
use crate::failure::{Failure, exit, note};
use crate::output::print;
use crate::units::plain;

const CLIENT_VERSION: &str = env!("CARGO_PKG_VERSION");

pub async fn run(ctx: &Context) -> Result<u8, Failure> {
    let daemon = match daemon(ctx).await {
        Ok(reply) => Some(reply),
        Err(error) => {
            note(ctx.format, &error.to_string());
            None
        }
    };
    let object = serde_json::json!({
        "client": { "version": CLIENT_VERSION },
        "daemon": daemon.as_ref().map(|reply| serde_json::json!({
            "address": reply.address, "version": reply.version, "protocol": reply.protocol,
        })),
    });
    print(ctx.format, &object, || {
        let client = format!("migctl {CLIENT_VERSION}");
        match &daemon {
            None => client,
            Some(reply) => format!(
                "{client}\nmigrd {} (protocol {}) at {}",
                plain(&reply.version),
                reply.protocol,
                plain(&reply.address)
            ),
        }
    })?;
    Ok(exit::DONE)
}

async fn daemon(ctx: &Context) -> Result<HostReply, ClientError> {
    let doing = "version of the daemon unknown";
    let client = ctx.connect(doing).await?;
    match client.rpc().host(HostRequest::default()).await {
        Ok(reply) => Ok(reply.into_inner()),
        Err(status) => Err(client.explain(doing, &status)),
    }
}
