//! `migrate`: moves a workload, or with `--dry-run` says whether it could.

use migr_proto::v1::{MigrateRequest, MigrationMode, WorkloadKind};
use tonic::Code;

use super::Context;
use super::exec_process::options;
use crate::args::{MigrateArgs, Mode};
use crate::client::{Client, ClientError, Refusal};
use crate::failure::{Failure, exit};
use crate::output::json::{self, Blocker, Migration, Outcome};
use crate::output::{human, print};
use crate::track::{Interrupt, Tracker, conclude};

pub async fn run(ctx: &Context, args: MigrateArgs) -> Result<u8, Failure> {
    let dry_run = args.dry_run;
    let request = request(args);
    let doing = format!("cannot migrate {}", request.name);
    let client = ctx.connect(&doing).await?;
    if dry_run {
        return plan(ctx, &client, &doing, request).await;
    }
    let known = Migration {
        workload: request.name.clone(),
        kind: json::kind(WorkloadKind::Unspecified),
        mode: json::mode(request.mode()),
        source: ctx.host.clone(),
        destination: request.to.clone(),
        ..Migration::default()
    };
    let stream = match client.rpc().migrate(request).await {
        Ok(reply) => Some(reply.into_inner()),
        Err(status) => match client.explain(&doing, &status) {
            ClientError::Refused { refusal, .. } if is_preflight(&refusal) => {
                return conclude(ctx, &refused(known, *refusal));
            }
            // The request may have arrived: what became of it must be asked.
            ClientError::Lost { .. } => None,
            error => return Err(error.into()),
        },
    };
    Tracker::new(ctx, client, known, Interrupt::Cancels).run(stream).await
}

fn request(args: MigrateArgs) -> MigrateRequest {
    let mode = match args.mode {
        None => MigrationMode::Unspecified,
        Some(Mode::Precopy) => MigrationMode::Precopy,
        Some(Mode::Stop) => MigrationMode::Stop,
        Some(Mode::Postcopy) => MigrationMode::Postcopy,
        Some(Mode::Hybrid) => MigrationMode::Hybrid,
    };
    MigrateRequest {
        name: args.name,
        to: args.to,
        mode: mode.into(),
        max_downtime_us: args.max_downtime.unwrap_or(0),
        timeout_ms: args.timeout.unwrap_or(0),
        verify: args.verify,
        copy_disks: args.copy_disks,
        process: Some(options(args.process)),
    }
}

async fn plan(
    ctx: &Context,
    client: &Client,
    doing: &str,
    request: MigrateRequest,
) -> Result<u8, Failure> {
    let reply = client.rpc().plan_migration(request).await;
    let plan = match reply.map_err(|status| client.explain(doing, &status)) {
        Ok(reply) => json::Plan::from(reply.into_inner()),
        Err(error) => {
            let refused =
                matches!(&error, ClientError::Refused { refusal, .. } if is_preflight(refusal));
            let failure = Failure::from(error);
            if !refused {
                return Err(failure);
            }
            failure.report(ctx.format);
            return Ok(exit::REFUSED);
        }
    };
    print(ctx.format, &plan, || human::plan(&plan))?;
    Ok(if plan.possible { exit::DONE } else { exit::REFUSED })
}

/// Whether an error that came instead of a report means that the request was
/// judged and turned down, with nothing touched.
fn is_preflight(refusal: &Refusal) -> bool {
    match refusal.status {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unavailable => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Internal
        | Code::DataLoss => false,
    }
}

/// A refusal in the form that a result has.
fn refused(known: Migration, refusal: Refusal) -> Migration {
    let blocker = Blocker {
        code: refusal.code,
        message: refusal.message,
        host: Some(refusal.host),
        remedy: refusal.remedy,
    };
    Migration { outcome: Outcome::Failed, blockers: vec![blocker], ..known }
}
