//! Problems as they are found, no more of a kind than a person reads.

use std::collections::BTreeMap;

use crate::workload::Problem;

/// How many problems of one code are told one by one.
const EACH: usize = 16;

/// Takes problems.
#[derive(Debug, Default)]
pub(super) struct Report {
    problems: Vec<Problem>,
    counts: BTreeMap<&'static str, usize>,
}

impl Report {
    /// One more problem.
    pub(super) fn add(
        &mut self,
        code: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let count = self.counts.entry(code).or_default();
        *count += 1;
        if *count <= EACH {
            self.problems.push(Problem::new(code, message, remedy));
        }
    }

    /// How many there are so far.
    pub(super) fn count(&self) -> usize {
        self.problems.len()
    }

    /// All of them; of a code that was found too often, how many more there are.
    pub(super) fn finish(mut self) -> Vec<Problem> {
        for (code, count) in self.counts {
            let more = count.saturating_sub(EACH);
            let Some(last) = self.problems.iter().rev().find(|p| p.code == code) else { continue };
            if more > 0 {
                let remedy = last.remedy.clone();
                self.problems.push(Problem::new(code, format!("and {more} more of these"), remedy));
            }
        }
        self.problems
    }
}
