//! Which way memory moves, and why. Pure.

use crate::migration::phase::Mode;
use crate::workload::{Ahead, Follows};

/// What somebody who asks for mode postcopy is told of it.
const AT_STAKE: &str = "it was asked for. Until all its memory has followed both hosts are \
    needed: it stands still while the link is cut, and it is lost if either host is";

/// A mode, and the reason for it, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// How memory moves.
    pub mode: Mode,
    /// Why so.
    pub why: String,
}

/// The workload can't move in the mode that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it can't move in mode {mode}: {why}")]
pub struct NoSuchMode {
    mode: &'static str,
    /// Why not.
    pub why: String,
}

impl NoSuchMode {
    /// What to do instead.
    pub const REMEDY: &str = "use --mode stop, or leave --mode out";
}

/// The mode that was asked for, or else the best that the workload has now. That its
/// memory follows puts it at risk, and is never chosen unasked.
///
/// # Errors
/// When it has not what was asked for.
pub fn choose(asked: Option<Mode>, ahead: &Ahead, follows: &Follows) -> Result<Chosen, NoSuchMode> {
    let chosen = |mode, why: &str| Ok(Chosen { mode, why: why.to_owned() });
    let no = |mode, why: &String| Err(NoSuchMode { mode, why: why.clone() });
    match (asked, ahead, follows) {
        (Some(Mode::Precopy), Ahead::Not(why), _) => no("precopy", why),
        (Some(Mode::Postcopy), _, Follows::Not(why)) => no("postcopy", why),
        (Some(Mode::Postcopy), _, Follows::Can) => chosen(Mode::Postcopy, AT_STAKE),
        (Some(mode @ (Mode::Precopy | Mode::Stop)), ..) => chosen(mode, "it was asked for"),
        (None, Ahead::Pages, _) => {
            chosen(Mode::Precopy, "its memory can be sent while it runs, page by page")
        }
        (None, Ahead::Copies { pays: true, why }, _) => chosen(Mode::Precopy, why),
        (None, Ahead::Copies { pays: false, why } | Ahead::Not(why), _) => chosen(Mode::Stop, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copies(pays: bool) -> Ahead {
        Ahead::Copies { pays, why: format!("pays: {pays}") }
    }

    fn no_way() -> Follows {
        Follows::Not("nothing brings it".into())
    }

    #[test]
    fn without_an_order_the_best_mode_is_taken_and_says_why() {
        let not = Ahead::Not("nobody looks".into());
        let table = [
            (Ahead::Pages, Mode::Precopy, "page by page"),
            (copies(true), Mode::Precopy, "pays: true"),
            (copies(false), Mode::Stop, "pays: false"),
            (not, Mode::Stop, "nobody looks"),
        ];
        for (ahead, mode, why) in table {
            for follows in [Follows::Can, no_way()] {
                let chosen = choose(None, &ahead, &follows).unwrap();
                assert_eq!(chosen.mode, mode, "{ahead:?}");
                assert!(chosen.why.contains(why), "{chosen:?}");
            }
        }
    }

    #[test]
    fn an_order_is_obeyed_or_refused_with_the_reason() {
        let not = Ahead::Not("nobody looks".into());
        let asked = |mode, ahead: &Ahead| choose(Some(mode), ahead, &no_way());
        for ahead in [&Ahead::Pages, &copies(true), &copies(false)] {
            assert_eq!(asked(Mode::Precopy, ahead).unwrap().mode, Mode::Precopy);
            assert_eq!(asked(Mode::Stop, ahead).unwrap().mode, Mode::Stop);
        }
        assert_eq!(asked(Mode::Stop, &not).unwrap().mode, Mode::Stop);
        let refused = asked(Mode::Precopy, &not).unwrap_err();
        assert!(refused.to_string().contains("precopy: nobody looks"), "{refused}");
    }

    #[test]
    fn memory_follows_only_when_asked_for_and_then_what_is_at_stake_is_said() {
        for ahead in [Ahead::Pages, copies(true), Ahead::Not("nobody looks".into())] {
            let chosen = choose(Some(Mode::Postcopy), &ahead, &Follows::Can).unwrap();
            assert_eq!(chosen.mode, Mode::Postcopy);
            assert!(chosen.why.contains("lost if either host is"), "{chosen:?}");
            let refused = choose(Some(Mode::Postcopy), &ahead, &no_way()).unwrap_err();
            assert!(refused.to_string().contains("postcopy: nothing brings it"), "{refused}");
        }
    }
}
