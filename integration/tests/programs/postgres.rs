//! PostgreSQL, which does not run as root, and one session that inserts all the time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail, ensure};
use integration::programs::Installed;
use integration::two_nets::TwoNets;
use integration::wait;

use super::service::{NOBODY, Order, Service, on_hosts, takes_other_users};

/// Rows after whose commit the session is believed to live.
const SOME: u64 = 30;

/// What has a program run as nobody. It may still read everything: a directory above
/// the program or its data may be its owner's alone.
fn as_nobody() -> Vec<String> {
    let user = NOBODY.to_string();
    let words = ["/usr/bin/setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    let capabilities = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"];
    words.into_iter().chain(capabilities).map(ToOwned::to_owned).collect()
}

/// A session, over one connection.
struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    fn open(address: std::net::SocketAddr) -> Result<Self> {
        let program = Installed::postgresql("psql")?;
        let mut command = Command::new(&program.path);
        command.envs(program.variable());
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        command.args(["-h", &host, "-p", &port, "-U", "postgres", "--no-psqlrc", "-qAt"]);
        command.args(["-v", "ON_ERROR_STOP=1"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, input, output })
    }

    /// The one line that a statement gives.
    fn ask(&mut self, statement: &str) -> Result<String> {
        writeln!(self.input, "{statement};")?;
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("psql ended with {}", self.child.wait()?);
        }
        Ok(line.trim_end().to_owned())
    }

    /// Runs a statement that gives nothing.
    fn run(&mut self, statement: &str) -> Result<()> {
        ensure!(self.ask(&format!("{statement}; SELECT 'done'"))? == "done");
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Its input has not ended yet: what goes with the session goes now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Inserts row after row, each in a transaction of its own.
struct Inserting {
    committed: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
    thread: JoinHandle<Result<Session>>,
}

impl Inserting {
    fn start(mut session: Session) -> Self {
        let (committed, enough) = (Arc::default(), Arc::default());
        let (counted, ends): (Arc<AtomicU64>, Arc<AtomicBool>) =
            (Arc::clone(&committed), Arc::clone(&enough));
        let thread = std::thread::spawn(move || {
            for number in 1_u64.. {
                if ends.load(Ordering::Acquire) {
                    break;
                }
                let insert = format!("INSERT INTO kept VALUES ({number}) RETURNING number");
                let answer = session.ask(&insert)?;
                ensure!(answer == number.to_string(), "row {number}: {answer}");
                counted.store(number, Ordering::Release);
            }
            Ok(session)
        });
        Self { committed, enough, thread }
    }

    fn goes_on(&self) -> Result<()> {
        let until = self.committed.load(Ordering::Acquire) + SOME;
        wait::until("rows to be committed", || {
            ensure!(!self.thread.is_finished(), "the session has ended");
            Ok((self.committed.load(Ordering::Acquire) >= until).then_some(()))
        })
    }

    /// Ends it; its session, and how many rows were committed.
    fn end(self) -> Result<(Session, u64)> {
        self.enough.store(true, Ordering::Release);
        let session = self.thread.join().map_err(|_| anyhow!("the client panicked"))??;
        Ok((session, self.committed.load(Ordering::Acquire)))
    }
}

/// Makes a database that everybody of the hosts' network may use.
fn make_database(data: &Path) -> Result<()> {
    let initdb = Installed::postgresql("initdb")?;
    let nobody = as_nobody();
    let mut command = Command::new(&nobody[0]);
    command.args(&nobody[1..]).arg(&initdb.path).envs(initdb.variable());
    command.args(["--auth=trust", "--username=postgres", "--no-locale", "--encoding=UTF8"]);
    let made = command.arg("--pgdata").arg(data).current_dir("/").output()?;
    ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
    let rules = data.join("pg_hba.conf");
    let text = std::fs::read_to_string(&rules)?;
    let everybody = "host all all 10.98.0.0/24 trust\n";
    Ok(std::fs::write(&rules, text + everybody)?)
}

fn server<'n>(nets: &'n TwoNets, data: &Path) -> Result<Service<'n>> {
    let program = Installed::postgresql("postgres")?;
    let nobody = as_nobody();
    let nobody: Vec<&str> = nobody.iter().map(String::as_str).collect();
    let data = data.display().to_string();
    let listen = ["-c", "listen_addresses=10.98.0.64", "-c", "unix_socket_directories="];
    let order = Order {
        name: "postgres",
        address: "10.98.0.64:5432",
        program: &program,
        before: &nobody,
        args: &[&["-D", &data][..], &listen].concat(),
        env: &[],
    };
    Service::start(nets, &order)
}

/// No committed row is missing, and the session is the one that it was.
fn verify(mut session: Session, backend: &str, rows: u64) -> Result<()> {
    ensure!(session.ask("SELECT pg_backend_pid()")? == backend, "it is another session");
    let found = session.ask("SELECT count(*), count(DISTINCT number), max(number) FROM kept")?;
    ensure!(found == format!("{rows}|{rows}|{rows}"), "of {rows} rows: {found}");
    // What a session has for itself alone.
    ensure!(session.ask("SELECT count(*) FROM noted")? == "1");
    Ok(())
}

#[test]
fn postgres_moves_where_migrd_may_take_other_users_or_is_refused_by_name() -> Result<()> {
    on_hosts(|nets| {
        let directory = tempfile::Builder::new().prefix("migr-postgres-").tempdir()?;
        chown(directory.path(), Some(NOBODY), Some(NOBODY))?;
        let data = directory.path().join("data");
        make_database(&data)?;
        let mut postgres = server(nets, &data)?;
        drop(postgres.connect()?);
        let mut session = wait::until("postgres to take sessions", || {
            let mut session = Session::open(postgres.address)?;
            // While it starts it refuses them.
            Ok(session.ask("SELECT 1").is_ok().then_some(session))
        })?;
        let backend = session.ask("SELECT pg_backend_pid()")?;
        session.run("CREATE TABLE kept (number bigint PRIMARY KEY)")?;
        session.run("CREATE TEMPORARY TABLE noted AS SELECT 1 AS one")?;
        let inserting = Inserting::start(session);
        inserting.goes_on()?;
        if takes_other_users(nets)? {
            postgres.there_and_back(|| inserting.goes_on())?;
        } else {
            postgres.is_refused("other-user")?;
            inserting.goes_on()?;
        }
        let (session, rows) = inserting.end()?;
        verify(session, &backend, rows)?;
        postgres.end()
    })
}
