//! What would keep a snapshot from being written. Touches nothing.

use std::fs;
use std::io;
use std::path::Path;

use super::{CheckpointError, blocking, carry, tree};
use crate::registry::Registry;
use crate::workload::{Problem, ProcessOptions};

/// What keeps the workload `name`, as it is now, from being written to
/// `directory`, on top of the snapshot in `parent`; empty: nothing is known to.
///
/// # Errors
/// When it is not here, or can't be looked at.
pub async fn plan(
    registry: &Registry,
    name: &str,
    directory: &Path,
    process: ProcessOptions,
    parent: Option<&Path>,
) -> Result<Vec<Problem>, CheckpointError> {
    let onto = match tree::Onto::find(parent, directory).await {
        Ok(onto) => onto,
        Err(error) => {
            let remedy = "name a snapshot of this workload, or leave --parent out";
            return Ok(vec![Problem::new("snapshot-parent", error.to_string(), remedy)]);
        }
    };
    let looked = registry.look(name, carry(process, onto.chain())).await?;
    let mut problems = looked.problems;
    problems.extend(onto.problem(looked.saves_files));
    let place = directory.to_owned();
    problems.extend(blocking(move || Ok(unusable(&place))).await?);
    Ok(problems)
}

/// Why no snapshot can be written to `directory`.
fn unusable(directory: &Path) -> Option<Problem> {
    let shown = directory.display();
    let problem = |message: String, remedy: &str| {
        Some(Problem::new("snapshot-directory", message, remedy.to_owned()))
    };
    match fs::read_dir(directory).map(|mut entries| entries.next().is_some()) {
        Ok(false) => None,
        Ok(true) => problem(
            format!("{shown} is there and not empty"),
            "name a directory that is not there yet",
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = directory.parent().unwrap_or(directory);
            if parent.is_dir() {
                return None;
            }
            problem(
                format!("{shown} can't be made: {} is no directory", parent.display()),
                "make that first, or name another directory",
            )
        }
        Err(error) => problem(format!("cannot read {shown}: {error}"), "name another directory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_needs_an_empty_directory_or_a_place_to_make_one() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("snap");
        assert_eq!(unusable(&place), None);
        assert!(!place.exists(), "it only looks");
        assert!(unusable(&place.join("deeper")).is_some());
        fs::create_dir(&place).unwrap();
        assert_eq!(unusable(&place), None);
        fs::write(place.join("file"), "x").unwrap();
        let found = unusable(&place).unwrap();
        assert_eq!(found.code, "snapshot-directory");
        assert!(found.message.contains("not empty"), "{found:?}");
        assert!(unusable(&place.join("file")).unwrap().message.contains("cannot read"));
    }
}
