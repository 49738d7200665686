//! Breadth first over everything that can happen, with what must always hold.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::host::{Giving, Taking};
use super::{Action, Host, Message};
use crate::migration::journal::{Event, Ownership};

/// How much may happen in one run.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub migrations: u8,
    pub crashes: u8,
    /// An operator gives up what the peer holds, and forgets what is gone. That
    /// copy is then the only one, so nothing may befall it in the model.
    pub operator: bool,
    /// Memory follows, in every migration.
    pub follows: bool,
}

/// What was explored.
#[derive(Debug, Default)]
pub struct Found {
    pub states: usize,
    pub releases: usize,
    pub taken_back: usize,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    hosts: [Host; 2],
    /// By the host it is for.
    sent: BTreeSet<(usize, Message)>,
    started: u8,
    crashes: u8,
}

impl World {
    fn new(follows: bool) -> Self {
        Self {
            hosts: [Host::new(true, follows), Host::new(false, follows)],
            sent: BTreeSet::new(),
            started: 0,
            crashes: 0,
        }
    }

    fn actions(&self, limits: Limits) -> Vec<Action> {
        let mut all = Vec::new();
        for (number, host) in self.hosts.iter().enumerate() {
            if !host.up {
                all.push(Action::Restart(number, true));
                // After an operator let go, the sealed copy is the only one.
                if host.record.sealed.is_some() && !limits.operator {
                    all.push(Action::Restart(number, false));
                }
                continue;
            }
            if self.crashes < limits.crashes {
                all.push(Action::Crash(number));
            }
            if host.may_start() && self.started < limits.migrations {
                all.push(Action::Start(number));
            }
            if let Some((_, giving)) = host.giving {
                all.push(Action::Abort(number));
                if giving == Giving::Sealed {
                    all.push(Action::Release(number));
                }
            }
            if host.released().is_some() {
                all.push(Action::Settle(number));
            }
            match host.taking {
                Some((_, _, Taking::Starting)) => {
                    all.push(Action::Begin(number, true));
                    if !limits.operator {
                        all.push(Action::Begin(number, false));
                    }
                }
                Some(_) => all.push(Action::Tick(number)),
                None => {}
            }
            if host.fills_from().is_some() && host.taking.is_none() {
                all.push(Action::Fill(number));
            }
            if limits.operator {
                self.operator(number, &mut all);
            }
        }
        for &(to, message) in &self.sent {
            let host = &self.hosts[to];
            match (message, host.taking) {
                _ if !host.up => {}
                (Message::Seal(m), Some((now, _, Taking::Receiving))) if now == m => {
                    all.extend([true, false].map(|good| Action::Seal(to, message, good)));
                }
                _ => all.push(Action::Deliver(to, message)),
            }
        }
        all
    }

    fn operator(&self, number: usize, all: &mut Vec<Action>) {
        let (host, other) = (&self.hosts[number], &self.hosts[1 - number]);
        let there = other.record.sealed.as_ref().map(|s| s.from.migration);
        match &host.record.ownership {
            Ownership::Released(to) if there == Some(to.migration) && other.copy => {
                all.push(Action::GiveUp(number));
            }
            Ownership::Gone(_) if host.record.sealed.is_none() && host.taking.is_none() => {
                all.push(Action::Forget(number));
            }
            _ => {}
        }
    }

    fn after(&self, action: Action) -> Self {
        let mut next = self.clone();
        let said = match action {
            Action::Start(number) => {
                next.started += 1;
                (1 - number, next.hosts[number].start(next.started))
            }
            Action::Abort(number) => (1 - number, next.hosts[number].abort()),
            Action::Release(number) => (1 - number, next.hosts[number].release()),
            Action::Settle(number) => (1 - number, next.hosts[number].settle()),
            Action::Seal(number, Message::Seal(m), good) => {
                (1 - number, next.hosts[number].seal(m, good))
            }
            Action::Seal(number, ..) => (1 - number, Vec::new()),
            Action::Begin(number, good) => (1 - number, next.hosts[number].begin(good)),
            Action::Tick(number) => (1 - number, next.hosts[number].tick()),
            Action::Fill(number) => {
                next.hosts[number].fill();
                (number, Vec::new())
            }
            Action::Deliver(number, message) => (1 - number, next.hosts[number].receive(message)),
            Action::Crash(number) => {
                next.crashes += 1;
                next.hosts[number].crash();
                (number, Vec::new())
            }
            Action::Restart(number, survived) => {
                next.hosts[number].restart(survived);
                (number, Vec::new())
            }
            Action::GiveUp(number) => {
                next.hosts[number].operator(&Event::GivenUp);
                (number, Vec::new())
            }
            Action::Forget(number) => {
                let epoch = next.hosts[number].record.epoch;
                next.hosts[number].operator(&Event::Removed(epoch));
                (number, Vec::new())
            }
        };
        let (to, messages) = said;
        next.sent.extend(messages.into_iter().map(|m| (to, m)));
        next
    }

    /// What is wrong with it, if anything.
    fn wrong(&self, before: Option<&Self>) -> Option<String> {
        let runs = self.hosts.iter().filter(|h| h.runs).count();
        let owners = self.hosts.iter().filter(|h| h.record.owned()).count();
        if runs > 1 || owners > 1 {
            return Some(format!("{runs} run and {owners} own it"));
        }
        for host in &self.hosts {
            if host.runs && !host.record.owned() {
                return Some("one runs what it does not own".into());
            }
            if host.record.owned() && !host.copy {
                return Some("the owner has lost it".into());
            }
            if host.record.sealed.as_ref().is_some_and(|s| s.epoch <= host.record.epoch) {
                return Some("a sealed copy is older than what was here".into());
            }
        }
        if !self.hosts.iter().any(|h| h.copy) {
            return Some("no copy is left".into());
        }
        for (host, other) in [(0, 1), (1, 0)].map(|(a, b)| (&self.hosts[a], &self.hosts[b])) {
            let kept = other.released().map(|(m, _)| m).filter(|_| other.copy && !other.runs);
            if host.fills_from().is_some_and(|m| kept != Some(m)) {
                return Some("memory that was to follow is gone".into());
            }
        }
        let before = before?;
        for (old, new) in before.hosts.iter().zip(&self.hosts) {
            if new.record.epoch < old.record.epoch {
                return Some("an epoch fell".into());
            }
            if !old.promised.is_subset(&new.promised) {
                return Some("a promise was forgotten".into());
            }
        }
        None
    }

    /// From here on nothing goes wrong and nothing old arrives: exactly one
    /// must own it and run it in the end.
    fn heals(&self) -> Result<(), String> {
        let mut world = self.clone();
        for host in world.hosts.iter_mut().filter(|h| !h.up) {
            host.restart(true);
        }
        for _ in 0..8 {
            let mut talk: VecDeque<(usize, Message)> = VecDeque::new();
            for number in 0..2 {
                let host = &mut world.hosts[number];
                let mut said = host.abort();
                said.extend(host.begin(true));
                if host.taking.is_none() {
                    host.fill();
                }
                said.extend(host.settle());
                said.extend(host.tick());
                talk.extend(said.into_iter().map(|m| (1 - number, m)));
            }
            while let Some((to, message)) = talk.pop_front() {
                let host = &mut world.hosts[to];
                let mut said = host.receive(message);
                said.extend(host.begin(true));
                talk.extend(said.into_iter().map(|m| (1 - to, m)));
                if let Some(wrong) = world.wrong(None) {
                    return Err(format!("while it heals: {wrong}"));
                }
            }
        }
        let owners = world.hosts.iter().filter(|h| h.record.owned() && h.runs).count();
        let open = world.hosts.iter().any(|h| h.record.sealed.is_some() || h.released().is_some());
        if owners == 1 && !open {
            return Ok(());
        }
        Err(format!("healed, {owners} own and run it, unsettled: {open}: {:#?}", world.hosts))
    }
}

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

/// Visits every state within `limits`.
///
/// # Panics
/// With the shortest trace to a state in which something is wrong.
pub fn explore(limits: Limits) -> Found {
    let first = World::new(limits.follows);
    let mut found = Found::default();
    let mut seen = HashSet::from([fingerprint(&first)]);
    // How each state was reached: from which, by what.
    let mut trace: Vec<(usize, Option<Action>)> = vec![(0, None)];
    let mut queue = VecDeque::from([(0, first)]);
    while let Some((at, world)) = queue.pop_front() {
        found.states += 1;
        if let Err(wrong) = world.heals() {
            panic!("{wrong}\nafter {:#?}", path(&trace, at));
        }
        for action in world.actions(limits) {
            let next = world.after(action);
            if let Some(wrong) = next.wrong(Some(&world)) {
                panic!("{wrong}\nafter {:#?}\nthen {action:?}", path(&trace, at));
            }
            found.releases += usize::from(matches!(action, Action::Release(_)));
            let back = matches!(action, Action::Deliver(_, Message::ToldDiscarded(_)));
            found.taken_back += usize::from(back && next.hosts != world.hosts);
            if seen.insert(fingerprint(&next)) {
                trace.push((at, Some(action)));
                queue.push_back((trace.len() - 1, next));
            }
        }
    }
    found
}

fn path(trace: &[(usize, Option<Action>)], mut at: usize) -> Vec<Action> {
    let mut actions = Vec::new();
    while let (from, Some(action)) = trace[at] {
        actions.push(action);
        at = from;
    }
    actions.reverse();
    actions
}
