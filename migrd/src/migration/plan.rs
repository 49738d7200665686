//! What a migration would do, and what would stop it. Touches nothing.

use std::sync::Arc;
use std::time::Duration;

use crate::migration::link::{Blocker, LinkError, Offer, Peer, PeerFacts};
use crate::migration::mode::Chosen;
use crate::migration::phase::Mode;
use crate::migration::policy::{approximate, predict};
use crate::units::{Epoch, HostId, MigrationId, PAGE_SIZE};
use crate::workload::{Manifest, Needing, needed};

/// How long the peer has to say who it is.
const IDENTIFY_WAIT: Duration = Duration::from_secs(5);

/// What is asked before a migration starts.
pub struct Question {
    /// The destination.
    pub peer: Arc<dyn Peer>,
    /// This host.
    pub here: HostId,
    /// What keeps the workload from leaving this host.
    pub problems: Vec<Blocker>,
    /// What would be offered, without what it needs.
    pub manifest: Manifest,
    /// Says what it needs.
    pub needs: Needing,
    /// The epoch it would be owned in there.
    pub epoch: Epoch,
    /// How memory would move.
    pub mode: Chosen,
    /// How many lanes would carry it.
    pub lanes: u32,
    /// Memory it has touched, and what of its disks is sent, in bytes.
    pub populated_bytes: u64,
    /// Of that, what is sent while it runs in whatever mode, in bytes.
    pub files_bytes: u64,
    /// Bytes a second of the last migration to that peer; 0: never measured.
    pub known_rate: f64,
    /// What a stop costs besides memory.
    pub fixed_cost: Duration,
}

impl Question {
    /// How long all of it would take, and how long the workload would stand still, before
    /// a page was looked at; `None` without a known rate.
    #[must_use]
    pub fn predicted(&self) -> Option<(Duration, Duration)> {
        if self.known_rate <= 0.0 {
            return None;
        }
        let pages = self.populated_bytes / PAGE_SIZE;
        let all = predict(pages, self.known_rate, self.fixed_cost);
        let still = (self.populated_bytes.saturating_sub(self.files_bytes)) / PAGE_SIZE;
        let downtime = match self.mode.mode {
            Mode::Stop => predict(still, self.known_rate, self.fixed_cost),
            Mode::Precopy | Mode::Postcopy => self.fixed_cost,
        };
        tracing::debug!(bytes = approximate(self.populated_bytes), ?all, "predicted");
        Some((all, downtime))
    }
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How memory would move.
    pub mode: Chosen,
    /// What stops it; empty: nothing.
    pub blockers: Vec<Blocker>,
    /// What of its files is sent while it runs in whatever mode, in bytes.
    pub files_bytes: u64,
    /// What the destination says of itself, if it is a migrd.
    pub peer: Option<PeerFacts>,
    /// The rate the predictions use, in bytes a second; 0 if none is known.
    pub rate: f64,
    /// How long all of it would take; `None` without a known rate.
    pub total: Option<Duration>,
    /// How long the workload would stand still; in mode precopy what is known
    /// before a page was looked at: the fixed cost.
    pub downtime: Option<Duration>,
}

fn blocker(code: &str, message: String, remedy: impl Into<String>, host: &str) -> Blocker {
    Blocker { code: code.to_owned(), message, remedy: remedy.into(), host: host.to_owned() }
}

/// Asks the peer, without leaving anything there.
pub async fn plan(question: &Question) -> Plan {
    let mut plan = Plan {
        mode: question.mode.clone(),
        blockers: question.problems.clone(),
        files_bytes: question.files_bytes,
        peer: None,
        rate: question.known_rate,
        total: None,
        downtime: None,
    };
    if let Some((total, downtime)) = question.predicted() {
        (plan.total, plan.downtime) = (Some(total), Some(downtime));
    }
    let facts = match identify(question).await {
        Ok(facts) => facts,
        Err(found) => {
            plan.blockers.push(found);
            return plan;
        }
    };
    plan.peer = Some(facts);
    let needs = match needed(question.needs.clone()).await {
        Ok(needs) => needs,
        Err(error) => {
            let remedy = "see the log of this host's migrd";
            plan.blockers.push(blocker("needs", error.to_string(), remedy, ""));
            return plan;
        }
    };
    let wait = IDENTIFY_WAIT + needs.patience();
    let offer = Offer {
        migration: MigrationId::random(),
        epoch: question.epoch,
        manifest: Manifest { needs: needs.written, ..question.manifest.clone() },
        lanes: question.lanes,
        dry_run: true,
    };
    let address = question.peer.address();
    match tokio::time::timeout(wait, question.peer.offer(&offer)).await {
        Ok(Ok(blockers)) => plan.blockers.extend(blockers),
        Ok(Err(error)) => plan.blockers.push(unusable(&error, address)),
        Err(_) => plan.blockers.push(silent(address)),
    }
    plan
}

/// Makes sure that the peer is another migrd that this one can talk to.
///
/// # Errors
/// What stands in the way.
pub async fn identify(question: &Question) -> Result<PeerFacts, Blocker> {
    let address = question.peer.address();
    let facts = match tokio::time::timeout(IDENTIFY_WAIT, question.peer.identify()).await {
        Ok(Ok(facts)) => facts,
        Ok(Err(error)) => return Err(unusable(&error, address)),
        Err(_) => return Err(silent(address)),
    };
    if facts.host == question.here {
        return Err(blocker(
            "same-host",
            format!("{address} is this very migrd: the workload is there already"),
            "give the address of another host's migrd with --to",
            address,
        ));
    }
    Ok(facts)
}

fn silent(address: &str) -> Blocker {
    let message = format!("{address} accepts connections and does not answer");
    blocker("peer-silent", message, "check that it is a migrd and not overloaded", address)
}

fn unusable(error: &LinkError, address: &str) -> Blocker {
    let (code, remedy) = match error {
        LinkError::Lost { .. } => (
            "peer-unreachable",
            "check the address, that migrd runs there, and that no firewall is in between",
        ),
        LinkError::Rejected { .. } | LinkError::Source(_) => {
            ("peer-refused", "see the log of that migrd")
        }
        LinkError::Stranger { .. } | LinkError::Misbehaved { .. } => {
            ("not-a-peer", "give the address of a migrd whose version matches, see `migctl hosts`")
        }
    };
    blocker(code, error.to_string(), remedy, address)
}
