//! The table of what moves, in docs/processes.md: a program has one of each, and CRIU
//! moves it there and back.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration::host_pair::migrate;
use integration::process::served::{ADDRESS, own_network};
use integration::process::things::{THINGS, answer};
use integration::process::{PYTHON, wait_for_line};
use integration::two_nets::{Side, on_two_hosts};

const NAME: &str = "things";

/// The words of the table's last column that are things of the program.
fn documented() -> Result<BTreeSet<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/processes.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (_, table) = text.split_once("\n## What moves\n").context("no such section")?;
    let rows = table.lines().skip_while(|line| !line.starts_with('|'));
    let rows = rows.take_while(|line| line.starts_with('|')).skip(2);
    let mut words = BTreeSet::new();
    for row in rows {
        let cell = row.trim_end_matches('|').rsplit('|').next().context("an empty row")?;
        let shown: Vec<_> = cell.split('`').skip(1).step_by(2).collect();
        ensure!(!shown.is_empty(), "no test shows this: {row}");
        for word in shown {
            match Path::new(word).extension() {
                Some(_) => ensure!(path.with_file_name("..").join(word).exists(), "no {word}"),
                None => drop(words.insert(word.replace('_', " "))),
            }
        }
    }
    Ok(words)
}

/// The files of one host, as they are, for another.
fn copied(from: &Path, to: &Path) -> Result<()> {
    let everything = from.join(".");
    let ran = Command::new("cp").arg("--archive").arg(everything).arg(to).status()?;
    ensure!(ran.success(), "cp: {ran}");
    Ok(())
}

#[test]
fn everything_that_is_said_to_move_moves_there_and_back() -> Result<()> {
    on_two_hosts(|nets| {
        // Each host has files of its own at the same path: a lock on a file that both see
        // can't be taken at one as long as the other has it.
        let files = tempfile::Builder::new().prefix("migr-things-").tempdir()?;
        let of_hosts =
            [tempfile::tempdir_in(nets.directory())?, tempfile::tempdir_in(nets.directory())?];
        for (side, own) in [Side::A, Side::B].into_iter().zip(&of_hosts) {
            let script =
                format!("mount --bind '{}' '{}'", own.path().display(), files.path().display());
            nets.daemon_mut(side).before(&script);
        }
        nets.start()?;
        let own = own_network(ADDRESS);
        let own: Vec<_> = own.iter().map(String::as_str).collect();
        let directory = files.path().to_str().context("not text")?;
        let command = ["--", PYTHON, "-c", THINGS, directory];
        nets.a.migctl(&[&["exec-process", NAME], &own[..], &command].concat())?.ok()?;
        wait_for_line(&nets.a, NAME, "ready")?;
        for (number, at) in [Side::A, Side::B, Side::A].into_iter().enumerate() {
            if number > 0 {
                let (from, to) = (nets.daemon(at.other()), nets.daemon(at));
                let [a, b] = of_hosts.each_ref().map(|own| own.path());
                if at == Side::A {
                    copied(b, a)?
                } else {
                    copied(a, b)?
                }
                migrate(from, to, NAME, &["--mode", "stop", "--file-locks"])?.ok()?;
            }
            let things = answer(nets.daemon(at), NAME, &format!("q{number}"))?;
            let wrong: Vec<_> = things.iter().filter(|(_, state)| *state != "right").collect();
            ensure!(wrong.is_empty(), "after {number} moves: {wrong:?}");
            let names: BTreeSet<_> = things.into_keys().collect();
            ensure!(names == documented()?, "documented: {:?}, here: {names:?}", documented()?);
        }
        nets.a.migctl(&["stop", NAME, "--force"])?.ok()?;
        nets.remove(Side::A, NAME)
    })
}
