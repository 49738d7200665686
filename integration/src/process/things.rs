//! A program that has one of everything, and says of each thing whether it is what it was.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{lines, type_line};
use crate::daemon::Daemon;
use crate::wait;

/// The program. Its arguments: a directory for its files, and the things that it is to have,
/// by default all.
pub const THINGS: &str = include_str!("things.py");

/// What the program says of each thing, asked with that word.
///
/// # Errors
/// When it does not answer.
pub fn answer(host: &Daemon, name: &str, word: &str) -> Result<BTreeMap<String, String>> {
    type_line(host, name, word)?;
    let begin = format!("ANSWER {word} ");
    let line = wait::until("the program's answer", || {
        Ok(lines(host, name)?.into_iter().find(|line| line.starts_with(&begin)))
    })?;
    let things = line[begin.len()..].split(' ').filter_map(|thing| thing.split_once('='));
    Ok(things.map(|(name, state)| (name.replace('_', " "), state.to_owned())).collect())
}
