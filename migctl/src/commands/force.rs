//! `force`: settles a workload that is in doubt, on the operator's word.

use migr_proto::v1::{ForceAction, ForceRequest};

use super::Context;
use crate::args::ForceArgs;
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: ForceArgs) -> Result<u8, Failure> {
    let name = args.name;
    let (action, consequence) = if args.run_here {
        (
            ForceAction::RunHere,
            "if the destination runs it too, TWO copies will run, write to the same disks and \
             answer on the same addresses; make sure the destination is off for good",
        )
    } else {
        (
            ForceAction::GiveUp,
            "if the destination does not run it, NO copy will run and its memory is lost; make \
             sure that the destination runs it",
        )
    };
    if !args.yes {
        return Err(Failure::Usage(format!(
            "nothing was done to {name}: {consequence}. Add --yes when you have"
        )));
    }
    let doing = format!("cannot settle {name}");
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().force(ForceRequest { name, action: action.into() }).await;
    ctx.workload(&client, &doing, reply)
}
