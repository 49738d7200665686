//! Versions of CRIU on two hosts: images of a newer one may hold what an older one
//! can't read.

use crate::workload::Problem;

/// Whether the CRIU `here` is too old for images of `theirs`. A version that is not
/// known, or not one, is compared with nothing.
pub(super) fn older(here: &str, theirs: &str) -> Option<Problem> {
    let (own, other) = (branch(here)?, branch(theirs)?);
    (own < other).then(|| {
        let [major, minor] = other;
        Problem::new(
            "criu-older",
            format!(
                "CRIU here is {here}, and {major}.{minor} at the source: it may not be able to \
                 read what that writes"
            ),
            format!(
                "install CRIU {major}.{minor} or newer on that host, or name one with `migrd serve \
                 --criu PATH`"
            ),
        )
    })
}

/// Whether a CRIU speaks to page servers as is understood here: 4.2 has made their
/// messages longer.
pub(super) fn sends_pages(version: &str) -> bool {
    branch(version).is_some_and(|branch| branch >= [4, 2])
}

/// The two numbers of a version that say what images are like; the third is for
/// corrections.
fn branch(version: &str) -> Option<[u32; 2]> {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    Some([parts.next()??, parts.next()??])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_a_newer_criu_are_refused_by_name() {
        let problem = older("3.17.1", "4.2.1").unwrap();
        assert_eq!(problem.code, "criu-older");
        assert!(problem.message.contains("3.17.1") && problem.message.contains("4.2 "));
        assert!(problem.remedy.contains("CRIU 4.2"));
        assert!(older("4.9", "4.10").is_some(), "by number, not by spelling");
        for (here, theirs) in [("4.2", "4.2.1"), ("4.2.1", "3.17.1"), ("4.2.1", ""), ("", "4.2")] {
            assert_eq!(older(here, theirs), None, "{here} {theirs}");
        }
        assert_eq!(older("4.2", "99999999999.1"), None);
        assert_eq!(older("4.2", "x.y"), None);
    }

    #[test]
    fn only_a_known_version_sends_pages() {
        assert!(sends_pages("4.2") && sends_pages("4.2.1") && sends_pages("5.0"));
        assert!(!sends_pages("4.1.1") && !sends_pages("3.17.1") && !sends_pages(""));
    }
}
