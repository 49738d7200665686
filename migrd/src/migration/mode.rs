//! Which way memory moves, and why. Pure.

use crate::migration::phase::Mode;
use crate::workload::Ahead;

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
#[error("it can't move in mode precopy: {why}")]
pub struct NoSuchMode {
    /// Why not.
    pub why: String,
}

impl NoSuchMode {
    /// What to do instead.
    pub const REMEDY: &str = "use --mode stop, or leave --mode out";
}

/// The mode that was asked for, or else the best that the workload has now.
///
/// # Errors
/// When it has not what was asked for.
pub fn choose(asked: Option<Mode>, ahead: &Ahead) -> Result<Chosen, NoSuchMode> {
    let was_asked = |mode| Ok(Chosen { mode, why: "it was asked for".into() });
    let chosen = |mode, why: &str| Ok(Chosen { mode, why: why.to_owned() });
    match (asked, ahead) {
        (Some(Mode::Precopy), Ahead::Not(why)) => Err(NoSuchMode { why: why.clone() }),
        (Some(mode), _) => was_asked(mode),
        (None, Ahead::Pages) => {
            chosen(Mode::Precopy, "its memory can be sent while it runs, page by page")
        }
        (None, Ahead::Copies { pays: true, why }) => chosen(Mode::Precopy, why),
        (None, Ahead::Copies { pays: false, why } | Ahead::Not(why)) => chosen(Mode::Stop, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copies(pays: bool) -> Ahead {
        Ahead::Copies { pays, why: format!("pays: {pays}") }
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
            let chosen = choose(None, &ahead).unwrap();
            assert_eq!(chosen.mode, mode, "{ahead:?}");
            assert!(chosen.why.contains(why), "{chosen:?}");
        }
    }

    #[test]
    fn an_order_is_obeyed_or_refused_with_the_reason() {
        let not = Ahead::Not("nobody looks".into());
        for ahead in [&Ahead::Pages, &copies(true), &copies(false)] {
            assert_eq!(choose(Some(Mode::Precopy), ahead).unwrap().mode, Mode::Precopy);
            assert_eq!(choose(Some(Mode::Stop), ahead).unwrap().mode, Mode::Stop);
        }
        assert_eq!(choose(Some(Mode::Stop), &not).unwrap().mode, Mode::Stop);
        let refused = choose(Some(Mode::Precopy), &not).unwrap_err();
        assert!(refused.to_string().contains("precopy: nobody looks"), "{refused}");
    }
}
