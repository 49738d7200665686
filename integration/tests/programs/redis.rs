//! redis-server, written to all the time over one connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail, ensure};
use integration::programs::Installed;
use integration::two_nets::TwoNets;
use integration::wait;

use super::service::{Order, Service, on_hosts};

/// Keys that are written again and again.
const KEYS: u64 = 4000;
/// Writes that are on their way at once.
const BATCH: u64 = 16;
/// Acknowledged writes after which the connection is believed to live.
const SOME: u64 = 400;

/// What a server answers (the RESP protocol of redis), as far as it is asked for here.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Text(String),
    Number(u64),
    Bytes(Vec<u8>),
}

struct Connection(BufReader<TcpStream>);

impl Connection {
    fn send(&mut self, commands: &[Vec<String>]) -> Result<()> {
        let mut text = String::new();
        for words in commands {
            text += &format!("*{}\r\n", words.len());
            for word in words {
                text += &format!("${}\r\n{word}\r\n", word.len());
            }
        }
        Ok(self.0.get_mut().write_all(text.as_bytes())?)
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let line = line.strip_suffix("\r\n").context("the connection ended")?;
        let (kind, rest) = line.split_at_checked(1).context("an empty answer")?;
        Ok(match kind {
            "+" => Answer::Text(rest.to_owned()),
            ":" => Answer::Number(rest.parse()?),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().context("nothing is there")? + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Answer::Bytes(bytes)
            }
            _ => bail!("it answered {line}"),
        })
    }

    fn ask(&mut self, words: &[&str]) -> Result<Answer> {
        self.send(&[words.iter().map(ToString::to_string).collect()])?;
        self.answer()
    }
}

fn key(number: u64) -> String {
    format!("key:{}", number % KEYS)
}

/// What the write of that number writes.
fn value(number: u64) -> String {
    format!("{number:020}").repeat(1 + usize::try_from(number % 50).unwrap_or(0))
}

/// Writes all the time and checks every acknowledgement.
struct Load {
    acknowledged: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
    thread: JoinHandle<Result<Connection>>,
}

impl Load {
    fn start(mut connection: Connection) -> Self {
        let (acknowledged, enough) = (Arc::default(), Arc::default());
        let (counted, ends): (Arc<AtomicU64>, Arc<AtomicBool>) =
            (Arc::clone(&acknowledged), Arc::clone(&enough));
        let thread = std::thread::spawn(move || {
            let mut next = 1;
            while !ends.load(Ordering::Acquire) {
                write_batch(&mut connection, next)?;
                next += BATCH;
                counted.store(next - 1, Ordering::Release);
            }
            Ok(connection)
        });
        Self { acknowledged, enough, thread }
    }

    /// Waits until some more writes were acknowledged.
    fn goes_on(&self) -> Result<()> {
        let until = self.acknowledged.load(Ordering::Acquire) + SOME;
        wait::until("writes to be acknowledged", || {
            ensure!(!self.thread.is_finished(), "the client has given up");
            Ok((self.acknowledged.load(Ordering::Acquire) >= until).then_some(()))
        })
    }

    /// Ends it; its connection, and the number of the last write.
    fn end(self) -> Result<(Connection, u64)> {
        self.enough.store(true, Ordering::Release);
        let ended = self.thread.join().map_err(|_| anyhow!("the client panicked"))?;
        Ok((ended?, self.acknowledged.load(Ordering::Acquire)))
    }
}

fn write_batch(connection: &mut Connection, first: u64) -> Result<()> {
    let numbers = first..first + BATCH;
    let words = |words: [&str; 3]| words.map(ToOwned::to_owned).to_vec();
    let commands: Vec<_> = numbers
        .clone()
        .flat_map(|number| {
            [
                vec!["INCR".to_owned(), "count".to_owned()],
                words(["SET", &key(number), &value(number)]),
                words(["RPUSH", "list", &number.to_string()]),
            ]
        })
        .collect();
    connection.send(&commands)?;
    for number in numbers {
        // Had one been lost or done twice, it would count another number.
        let answers = [connection.answer()?, connection.answer()?, connection.answer()?];
        let right = [Answer::Number(number), Answer::Text("OK".into()), Answer::Number(number)];
        ensure!(answers == right, "write {number}: {answers:?}");
    }
    Ok(())
}

/// Every acknowledged write is there.
fn verify(connection: &mut Connection, last: u64) -> Result<()> {
    let text = last.to_string();
    ensure!(connection.ask(&["GET", "count"])? == Answer::Bytes(text.into_bytes()));
    ensure!(connection.ask(&["LLEN", "list"])? == Answer::Number(last));
    for number in last.saturating_sub(KEYS) + 1..=last {
        let found = connection.ask(&["GET", &key(number)])?;
        ensure!(found == Answer::Bytes(value(number).into_bytes()), "{}: {found:?}", key(number));
    }
    Ok(())
}

fn server<'n>(nets: &'n TwoNets, directory: &std::path::Path) -> Result<Service<'n>> {
    let program = Installed::find("usr/bin/redis-server")?;
    let directory = directory.display().to_string();
    let socket = format!("{directory}/redis.sock");
    let args = ["--bind", "10.98.0.60", "--port", "6379", "--protected-mode", "no"];
    let files = ["--dir", &directory, "--appendonly", "yes", "--unixsocket", &socket];
    let order = Order {
        name: "redis",
        address: "10.98.0.60:6379",
        program: &program,
        before: &[],
        args: &[&args[..], &files].concat(),
        env: &[],
    };
    Service::start(nets, &order)
}

#[test]
fn redis_under_load_loses_no_acknowledged_write_and_no_connection() -> Result<()> {
    on_hosts(|nets| {
        let directory = tempfile::Builder::new().prefix("migr-redis-").tempdir()?;
        let mut redis = server(nets, directory.path())?;
        let mut connection = Connection(BufReader::new(redis.connect()?));
        let client = connection.ask(&["CLIENT", "ID"])?;
        let load = Load::start(connection);
        load.goes_on()?;
        redis.there_and_back(|| load.goes_on())?;
        let (mut connection, last) = load.end()?;
        ensure!(connection.ask(&["CLIENT", "ID"])? == client, "it is another connection");
        verify(&mut connection, last)?;
        drop(connection);
        redis.end()
    })
}

#[test]
fn redis_with_a_client_at_its_unix_socket_is_refused_by_name_until_that_is_gone() -> Result<()> {
    on_hosts(|nets| {
        let directory = tempfile::Builder::new().prefix("migr-redis-").tempdir()?;
        let mut redis = server(nets, directory.path())?;
        let mut connection = Connection(BufReader::new(redis.connect()?));
        let mut beside = UnixStream::connect(directory.path().join("redis.sock"))?;
        beside.write_all(b"PING\r\n")?;
        let mut pong = [0; 7];
        beside.read_exact(&mut pong)?;
        ensure!(&pong == b"+PONG\r\n");
        redis.is_refused("socket-other-network")?;
        drop(beside);
        // The server has closed its end when it says that nobody else is there.
        wait::until("the client to be gone", || match connection.ask(&["CLIENT", "LIST"])? {
            Answer::Bytes(list) => {
                Ok((String::from_utf8(list)?.lines().count() == 1).then_some(()))
            }
            other => bail!("{other:?}"),
        })?;
        redis.go()?;
        ensure!(connection.ask(&["PING"])? == Answer::Text("PONG".into()));
        redis.end()
    })
}
