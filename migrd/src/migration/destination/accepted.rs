//! Accepted: the manifest was checked, name and memory are set aside, an empty
//! workload is ready. Soft: nothing of it is journalled, a crash drops it.

use std::sync::Arc;

use super::arrival::{Arrival, Facts};
use super::{Shared, identity};
use crate::migration::failpoint;
use crate::migration::journal::{Counterpart, Ownership};
use crate::migration::link::{Blocker, Offer};
use crate::units::{Epoch, PAGE_SIZE};
use crate::workload::Manifest;

/// The most lanes a migration may use.
pub const MAX_LANES: u32 = 16;
/// The most streams a workload may have.
pub const MAX_STREAMS: usize = 1024;
/// The longest name of a stream or workload, in bytes.
const MAX_NAME: usize = 63;
/// The longest config of a kind, in bytes.
pub const MAX_CONFIG: usize = 1 << 20;
/// The longest list of what a workload needs, in bytes.
const MAX_NEEDS: usize = 24 << 20;

fn blocker(code: &str, message: impl Into<String>, remedy: &str) -> Blocker {
    Blocker {
        code: code.to_owned(),
        message: message.into(),
        remedy: remedy.to_owned(),
        host: String::new(),
    }
}

/// Whether `name` can name a workload: letters, digits, `.`, `_` and `-`, not
/// first a `-` or `.`, at most 63 bytes.
#[must_use]
pub fn valid_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(plain)
        && name.bytes().all(|c| plain(c) || c == b'-' || c == b'.')
}

/// Checks of the manifest that need nothing of this host.
fn check_manifest(manifest: &Manifest, lanes: u32) -> Result<(), Blocker> {
    let bad =
        |what: String| blocker("bad-manifest", what, "bring both daemons to the same version");
    if !valid_name(&manifest.name) {
        return Err(bad("the workload's name is not valid".into()));
    }
    if lanes == 0 || lanes > MAX_LANES {
        return Err(bad(format!("{lanes} lanes were offered; 1 to {MAX_LANES} are possible")));
    }
    if manifest.streams.is_empty() || manifest.streams.len() > MAX_STREAMS {
        return Err(bad(format!("{} streams were offered", manifest.streams.len())));
    }
    if manifest.config.len() > MAX_CONFIG {
        return Err(bad("the configuration is too long".into()));
    }
    if manifest.needs.len() > MAX_NEEDS {
        return Err(bad("what it needs is too long".into()));
    }
    let mut keys: Vec<_> = manifest.streams.iter().map(|s| s.key).collect();
    keys.sort_unstable();
    keys.dedup();
    let odd = |length: u64| length == 0 || !length.is_multiple_of(PAGE_SIZE) || length > 1 << 46;
    if manifest.streams.iter().any(|s| s.name.len() > MAX_NAME) {
        return Err(bad("the name of a stream is too long".into()));
    }
    if keys.len() != manifest.streams.len() || manifest.streams.iter().any(|s| odd(s.length)) {
        return Err(bad("the streams repeat or have impossible lengths".into()));
    }
    Ok(())
}

/// Makes room for what is offered; `None` for a dry run that found nothing
/// in the way.
pub(super) async fn accept(
    shared: &Arc<Shared>,
    offer: Offer,
    from: Counterpart,
) -> Result<Option<Arrival>, Vec<Blocker>> {
    let manifest = &offer.manifest;
    check_manifest(manifest, offer.lanes).map_err(|b| vec![b])?;
    check_journal(shared, &offer).map_err(|b| vec![b])?;
    let engine = shared.host.engine(manifest.kind).ok_or_else(|| {
        let what = format!("this host can't run workloads of kind {:?}", manifest.kind);
        vec![blocker("kind", what, "see `migctl hosts` for what this host lacks")]
    })?;
    let found = engine.check(manifest).await.into_iter();
    let mut blockers: Vec<_> =
        found.map(|p| blocker(p.code, p.message, p.remedy.as_str())).collect();
    let claim = match shared.host.claim(manifest, offer.migration, offer.dry_run) {
        Ok(claim) => claim,
        Err(found) => {
            blockers.push(found);
            return Err(blockers);
        }
    };
    if !blockers.is_empty() {
        return Err(blockers);
    }
    if offer.dry_run {
        return Ok(None);
    }
    let prepared = engine.prepare(manifest).await;
    let workload = prepared.map_err(|error| {
        let remedy = "see the log of this host's migrd";
        vec![blocker("prepare", format!("cannot prepare the workload: {error}"), remedy)]
    })?;
    failpoint::reach(format_args!("destination-accepted"));
    let sink = workload.chunks();
    let intake = shared.gate.open(offer.migration, &manifest.streams, sink, offer.lanes);
    let paused = manifest.paused;
    let identity = identity(manifest);
    let shared = shared.clone();
    let follows = manifest.follows;
    let facts = Facts { shared, identity, epoch: offer.epoch, paused, follows, from, claim };
    Ok(Some(Arrival::receiving(facts, workload, intake)))
}

/// The latest epoch that is taken: no honest workload changes hands as often,
/// and the epochs after it must exist.
const MAX_EPOCH: Epoch = Epoch(1 << 62);

/// Whether the journal allows that workload to come here in that epoch.
fn check_journal(shared: &Shared, offer: &Offer) -> Result<(), Blocker> {
    let unreadable = |e: crate::migration::journal::JournalError| {
        blocker("journal", e.to_string(), "make the state directory of this host usable")
    };
    if shared.open().contains_key(&offer.migration) {
        return Err(blocker("repeated", "this migration was offered before", "start a new one"));
    }
    if shared.journal.is_discarded(offer.migration).map_err(unreadable)? {
        return Err(blocker("discarded", "this migration was discarded here", "start a new one"));
    }
    if offer.epoch <= Epoch::FIRST || offer.epoch > MAX_EPOCH {
        let message = format!("epoch {} can't be that of a workload that moves", offer.epoch);
        return Err(blocker("bad-epoch", message, "see the log of the source's migrd"));
    }
    let Some(record) = shared.journal.get(offer.manifest.workload).map_err(unreadable)? else {
        return Ok(());
    };
    let name = &offer.manifest.name;
    let here = match record.ownership {
        Ownership::Owned => Some(format!("{name} is here already (epoch {})", record.epoch)),
        Ownership::Released(to) => Some(format!(
            "{name} was given away by this host to {} and that is not settled",
            to.address
        )),
        Ownership::Never | Ownership::Gone(_) | Ownership::Removed(_) => None,
    };
    if let Some(message) = here {
        return Err(blocker("already-here", message, "see `migctl list` on this host"));
    }
    if record.sealed.is_some() {
        let message = format!("a sealed copy of {name} waits here for its source");
        return Err(blocker(
            "already-here",
            message,
            "settle it first: `migctl list` on this host",
        ));
    }
    if offer.epoch <= record.epoch {
        let message = format!(
            "{name} was here in epoch {} and is offered in epoch {}: what is offered is older",
            record.epoch, offer.epoch
        );
        return Err(blocker("stale-epoch", message, "remove the older copy at the source"));
    }
    Ok(())
}
