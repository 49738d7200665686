//! Owns the verbs, one file each: arguments to request, reply to output. They
//! may not print but through `output` and `failure`.

mod adopt;
mod cancel;
mod checkpoint;
mod completions;
mod console;
mod exec_process;
mod force;
mod hosts;
mod inspect;
mod list;
mod logs;
mod migrate;
mod pause;
mod restore;
mod resume;
mod rm;
mod run;
mod run_container;
mod stop;
mod version;
mod watch;

use std::path::Path;

use migr_proto::v1;
use tonic::{Response, Status};

use crate::args::{Cli, Format, Verb};
use crate::client::{Client, ClientError};
use crate::failure::{Failure, exit};
use crate::output::{human, json, print};

/// What every verb needs to know.
#[derive(Debug)]
pub struct Context {
    /// Address of the daemon to ask.
    pub host: String,
    /// How to print.
    pub format: Format,
}

impl Context {
    /// Connects to the daemon; `doing` begins the message if it fails.
    pub async fn connect(&self, doing: &str) -> Result<Client, ClientError> {
        Client::connect(&self.host, doing).await
    }

    /// Prints the workload that a verb answered with.
    fn workload(
        &self,
        client: &Client,
        doing: &str,
        reply: Result<Response<v1::Workload>, Status>,
    ) -> Result<u8, Failure> {
        let reply = reply.map_err(|status| client.explain(doing, &status))?;
        let workload = json::Workload::from(reply.into_inner());
        let object = serde_json::json!({ "workload": workload });
        print(self.format, &object, || human::workload(&workload))?;
        Ok(exit::DONE)
    }
}

/// Runs the verb; the exit status.
pub async fn run(cli: Cli) -> Result<u8, Failure> {
    let ctx = Context { host: cli.host, format: cli.output };
    match cli.verb {
        Verb::Run(args) => run::run(&ctx, args).await,
        Verb::ExecProcess(args) => exec_process::run(&ctx, args).await,
        Verb::RunContainer(args) => run_container::run(&ctx, args).await,
        Verb::Adopt(args) => adopt::run(&ctx, args).await,
        Verb::List(args) => list::run(&ctx, &args).await,
        Verb::Inspect(args) => inspect::run(&ctx, args).await,
        Verb::Logs(args) => logs::run(&ctx, args).await,
        Verb::Console(args) => console::run(&ctx, args).await,
        Verb::Migrate(args) => migrate::run(&ctx, args).await,
        Verb::Cancel(args) => cancel::run(&ctx, args).await,
        Verb::Watch(args) => watch::run(&ctx, args).await,
        Verb::Pause(args) => pause::run(&ctx, args).await,
        Verb::Resume(args) => resume::run(&ctx, args).await,
        Verb::Stop(args) => stop::run(&ctx, args).await,
        Verb::Rm(args) => rm::run(&ctx, args).await,
        Verb::Checkpoint(args) => checkpoint::run(&ctx, args).await,
        Verb::Restore(args) => restore::run(&ctx, args).await,
        Verb::Force(args) => force::run(&ctx, args).await,
        Verb::Hosts(args) => hosts::run(&ctx, args).await,
        Verb::Version => version::run(&ctx).await,
        Verb::Completions(args) => completions::run(&args),
    }
}

/// The absolute form of a path: the daemon opens it, in another directory.
fn absolute(path: &Path) -> Result<String, Failure> {
    let unusable = |why: &str| Failure::Usage(format!("the path {} {why}", path.display()));
    let absolute = std::path::absolute(path).map_err(|error| unusable(&error.to_string()))?;
    match absolute.into_os_string().into_string() {
        Ok(text) => Ok(text),
        Err(_) => Err(unusable("is not UTF-8, and the daemon takes no other")),
    }
}
