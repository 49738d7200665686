//! `hosts`: what the hosts are and have.

use migr_proto::v1::HostRequest;

use super::Context;
use crate::args::HostsArgs;
use crate::failure::{Failure, exit};
use crate::output::{human, json, print};

pub async fn run(ctx: &Context, args: HostsArgs) -> Result<u8, Failure> {
    let client = ctx.connect("cannot ask the host").await?;
    let mut hosts = Vec::new();
    for peer in [Some(String::new()), args.peer].into_iter().flatten() {
        let asked = if peer.is_empty() { "the host".to_owned() } else { peer.clone() };
        let reply = client.rpc().host(HostRequest { peer }).await;
        let reply =
            reply.map_err(|status| client.explain(&format!("cannot ask {asked}"), &status))?;
        hosts.push(json::Host::from(reply.into_inner()));
    }
    let object = serde_json::json!({ "hosts": hosts });
    print(ctx.format, &object, || human::hosts(&hosts))?;
    Ok(exit::DONE)
}
