//! Node, asked all the time over one connection.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use integration::programs::Installed;
use integration::two_nets::TwoNets;
use integration::wait;

use super::http::Connection;
use super::service::{Order, Service, on_hosts};

const PROGRAM: &str = include_str!("node.js");
/// Answers after which the connection is believed to live.
const SOME: u64 = 100;

/// Asks all the time, and checks that it is the same server with the same count.
struct Asking {
    answered: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Asking {
    fn start(mut connection: Connection) -> Self {
        let (answered, enough) = (Arc::default(), Arc::default());
        let (counted, ends): (Arc<AtomicU64>, Arc<AtomicBool>) =
            (Arc::clone(&answered), Arc::clone(&enough));
        let thread = std::thread::spawn(move || {
            let mut key = None;
            for number in 1_u64.. {
                if ends.load(Ordering::Acquire) {
                    break;
                }
                let answer = String::from_utf8(connection.ask("POST", "/", b"the same")?)?;
                let (count, now) = answer.split_once(' ').context("an odd answer")?;
                ensure!(count == number.to_string(), "answer {number}: {answer}");
                let first = key.get_or_insert_with(|| now.to_owned());
                ensure!(now.len() == 32 && *first == now, "answer {number}: {answer}");
                counted.store(number, Ordering::Release);
            }
            Ok(())
        });
        Self { answered, enough, thread }
    }

    fn goes_on(&self) -> Result<()> {
        let until = self.answered.load(Ordering::Acquire) + SOME;
        wait::until("answers", || {
            ensure!(!self.thread.is_finished(), "the client has given up");
            Ok((self.answered.load(Ordering::Acquire) >= until).then_some(()))
        })
    }

    fn end(self) -> Result<()> {
        self.enough.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow!("the client panicked"))?
    }
}

fn server<'n>(nets: &'n TwoNets, env: &[&str]) -> Result<Service<'n>> {
    let program = Installed::find("usr/bin/node")?;
    let order = Order {
        name: "node",
        address: "10.98.0.63:8080",
        program: &program,
        before: &[],
        args: &["-e", PROGRAM],
        env,
    };
    Service::start(nets, &order)
}

fn moves(mut node: Service<'_>) -> Result<()> {
    let asking = Asking::start(Connection::new(node.connect()?));
    asking.goes_on()?;
    node.there_and_back(|| asking.goes_on())?;
    asking.end()?;
    node.end()
}

#[test]
fn node_moves_while_it_answers() -> Result<()> {
    on_hosts(|nets| moves(server(nets, &["UV_USE_IO_URING=0"])?))
}

#[test]
fn node_that_uses_io_uring_is_refused_by_name() -> Result<()> {
    on_hosts(|nets| {
        let node = server(nets, &["UV_USE_IO_URING=1"])?;
        drop(node.connect()?);
        // Not every version does, and not every kernel lets it.
        if uses_io_uring(&node)? { refused(node) } else { moves(node) }
    })
}

fn refused(node: Service<'_>) -> Result<()> {
    let asking = Asking::start(Connection::new(node.connect()?));
    asking.goes_on()?;
    node.is_refused("io-uring")?;
    asking.goes_on()?;
    asking.end()?;
    node.end()
}

fn uses_io_uring(node: &Service<'_>) -> Result<bool> {
    for pid in node.processes()? {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            if fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("anon_inode:[io_uring]")) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
