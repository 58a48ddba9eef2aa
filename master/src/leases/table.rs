//! Who may cache which inode, and how changes get past those who do.
//!
//! A *lease* lets a session answer from what it knows of an inode (read), or also keep what it writes for itself for a
//! while (write). Whoever needs the inode otherwise makes a *claim*, which passes when no lease of another session is in
//! its way; those that are, are recalled.
//!
//! | claim | passes when others hold | while it waits or lasts, others get |
//! |---|---|---|
//! | `Change`: a command is proposed and applied; lasts until [`Leases::end`] | nothing | no lease |
//! | `See`: a question that what a holder buffers would falsify; where it had to wait it lasts until [`Leases::end`] | no write lease | no write lease |
//! | `Take(Read)` | no write lease | no lease that it would have to wait for |
//! | `Take(Write)` | nothing | no lease |
//!
//! ```text
//!            granted              reply sent              somebody claims             returned
//!  nobody ──────────▶ held, unsent ─────────▶ held, sent ─────────────────▶ recalled ─────────▶ nobody,
//!                          └── claimed meanwhile: recalled as soon as it is sent ──┘            or less
//! ```
//!
//! Claims of one inode take their turns: `Change` passes beside `Change`, `Take(Read)` beside `Take(Read)`, everything
//! beside claims of its own session; `See` waits for no claim, and only `Take(Write)` waits for it; all else waits for what
//! came before it. Nobody waits for what came after, and a session that holds a lease is never made to wait by claims that
//! want it back: what it flushes before it gives the lease back is a `Change` too. So claims cannot wait for each other in a
//! circle. And nobody starves: a question that waited for one writer is answered before the next one begins, and only as many
//! questions are as came while the first one wrote.
//!
//! A read between two leases: what a question saw may be cached only if nothing changed since. [`Leases::clock`] is taken
//! before the question looks at the state, and [`Leases::grant`] refuses when a change of the inode has ended since or is
//! under way.
//!
//! After an election nobody knows the leases but their holders. A session that has not said yet what it holds is in the way
//! of every claim on an inode of the buckets that the log has noted for it (`buckets.rs`), and of nothing else.

use super::buckets::{Buckets, bucket_of};
use dfs_env::defect::{self, Defect};
use dfs_proto::{InodeNo, SessionId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

/// Counters of ended changes; inodes that share one only lose a chance to be cached.
const STAMPS: usize = 4096;
/// Beyond nine tenths of the limit a tenth of all leases is asked back.
const CROWDED: (usize, usize) = (9, 10);
/// Memory that one lease takes, in bytes, where every inode has one holder: the most that [`tests::size`] computes.
pub const BYTES_PER_LEASE: usize = 160;

/// What a lease allows; each allows what those before it do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Kind {
    Read,
    Write,
}

/// Why somebody needs an inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum What {
    Change,
    See,
    Take(Kind),
}

impl What {
    /// Whether a lease of another session is in the way.
    fn is_barred_by(self, lease: Kind) -> bool {
        match self {
            Self::Change | Self::Take(Kind::Write) => true,
            Self::See | Self::Take(Kind::Read) => lease == Kind::Write,
        }
    }

    /// What a holder may keep of a lease that is in the way.
    fn leaves(self) -> Option<Kind> {
        match self {
            Self::Change | Self::Take(Kind::Write) => None,
            Self::See | Self::Take(Kind::Read) => Some(Kind::Read),
        }
    }

    /// Whether this waits for an `earlier` claim of another session.
    fn yields_to(self, earlier: Self) -> bool {
        match (self, earlier) {
            (Self::See, _)
            | (Self::Change | Self::Take(Kind::Read), Self::See)
            | (Self::Change, Self::Change)
            | (Self::Take(Kind::Read), Self::Take(Kind::Read)) => false,
            (Self::Change | Self::Take(_), _) => true,
        }
    }

    /// Whether leases of this kind are given to others while the claim is there.
    fn lets_others_take(self, kind: Kind) -> bool {
        match self {
            Self::Change | Self::Take(Kind::Write) => false,
            Self::See | Self::Take(Kind::Read) => kind == Kind::Read,
        }
    }
}

/// Names a claim.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct ClaimId(u64);

/// A moment in the order of changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Clock(u64);

impl Clock {
    /// As an answer tells of it.
    #[must_use]
    pub fn to_proto(self) -> u64 {
        self.0 + 1
    }
}

/// A holder is to give a lease back, down to `keep`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Recall {
    pub session: SessionId,
    pub ino: InodeNo,
    /// The number under which it was given.
    pub grant: u64,
    pub keep: Option<Kind>,
}

/// What follows from events, to be carried out in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actions {
    /// Claims that have passed. A `Take` has ended and holds its lease, to be sent with the answer; others last.
    pub passed: Vec<ClaimId>,
    pub recalls: Vec<Recall>,
    /// Buckets that the log has to note before leases in them can be given.
    pub notes: Vec<(SessionId, Kind, u32)>,
}

/// Where a session may hold leases, as the log knows.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    read: Buckets,
    write: Buckets,
}

impl Notes {
    fn of(&self, kind: Kind) -> &Buckets {
        match kind {
            Kind::Read => &self.read,
            Kind::Write => &self.write,
        }
    }

    /// The log has noted a bucket.
    pub fn add(&mut self, kind: Kind, bucket: u32) {
        match kind {
            Kind::Read => self.read.add(bucket),
            Kind::Write => self.write.add(bucket),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Lease {
    session: SessionId,
    kind: Kind,
    /// What its holder was told of.
    sent: Option<Kind>,
    /// The number of the last grant that was sent; 0: it was asserted.
    grant: u64,
    /// Its holder believes nothing any more, and commits what is left.
    flushing: bool,
}

#[derive(Clone, Debug, Default)]
struct Node {
    /// Any number of read leases, or one write lease.
    leases: Vec<Lease>,
    /// Claims that wait or last, in order of arrival.
    claims: Vec<ClaimId>,
}

#[derive(Clone, Debug)]
struct Claim {
    session: SessionId,
    what: What,
    inos: Vec<InodeNo>,
    passed: bool,
}

#[derive(Clone, Debug, Default)]
struct Holder {
    notes: Notes,
    inos: BTreeSet<InodeNo>,
}

#[derive(Clone, Copy, Debug)]
struct Recalled {
    keep: Option<Kind>,
    /// When it was asked for, or when the holder was last seen to be at it.
    since: Duration,
}

/// The last changes of the inodes that share a stamp.
#[derive(Clone, Copy, Debug, Default)]
struct Stamp {
    by: Option<SessionId>,
    last: u64,
    /// The last one by another session than `by`.
    before: u64,
}

/// All leases and claims.
#[derive(Clone, Debug)]
pub struct Leases {
    nodes: HashMap<InodeNo, Node>,
    holders: BTreeMap<SessionId, Holder>,
    claims: BTreeMap<ClaimId, Claim>,
    recalled: BTreeMap<(SessionId, InodeNo), Recalled>,
    /// Sessions of before the election that have not said what they hold.
    unclaimed: BTreeMap<SessionId, Notes>,
    stamps: Vec<Stamp>,
    changes: u64,
    next_claim: u64,
    next_grant: u64,
    total: usize,
    limit: usize,
    actions: Actions,
}

impl Leases {
    /// No leases; at most `limit` are given at a time. `unclaimed`: the sessions of before the election.
    #[must_use]
    pub fn new(limit: usize, unclaimed: impl IntoIterator<Item = (SessionId, Notes)>) -> Self {
        let no_grace = defect::has(Defect::NoGrace);
        let silent = |notes: &Notes| no_grace || (notes.read.is_empty() && notes.write.is_empty());
        Self {
            nodes: HashMap::new(),
            holders: BTreeMap::new(),
            claims: BTreeMap::new(),
            recalled: BTreeMap::new(),
            unclaimed: unclaimed.into_iter().filter(|(_, notes)| !silent(notes)).collect(),
            stamps: vec![Stamp::default(); STAMPS],
            changes: 0,
            next_claim: 1,
            next_grant: 1,
            total: 0,
            limit,
            actions: Actions::default(),
        }
    }

    /// What is to be done since the last call.
    #[must_use]
    pub fn take_actions(&mut self) -> Actions {
        std::mem::take(&mut self.actions)
    }

    /// To be taken before the state is looked at.
    #[must_use]
    pub fn clock(&self) -> Clock {
        Clock(self.changes)
    }

    /// The session that buffers changes of an inode.
    #[must_use]
    pub fn writer(&self, ino: InodeNo) -> Option<SessionId> {
        let lease = self.nodes.get(&ino)?.leases.first()?;
        (lease.kind == Kind::Write).then_some(lease.session)
    }

    /// What a session holds on an inode.
    #[must_use]
    pub fn held(&self, session: SessionId, ino: InodeNo) -> Option<Kind> {
        self.lease(session, ino).map(|lease| lease.kind)
    }

    /// How many leases a session holds.
    #[must_use]
    pub fn count(&self, session: SessionId) -> usize {
        self.holders.get(&session).map_or(0, |holder| holder.inos.len())
    }

    /// How many leases there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// Whether a session can be given no lease on one inode more, not even one that it waits for: these have a tenth more.
    #[must_use]
    pub fn is_full(&self, session: SessionId, ino: InodeNo) -> bool {
        self.total >= self.limit + self.limit / CROWDED.1 && self.held(session, ino).is_none()
    }

    /// When nearly all leases that there may be are given: how many each session is to give back, in proportion, so that
    /// nobody has to do without.
    #[must_use]
    pub fn surplus(&self) -> Vec<(SessionId, usize)> {
        if self.total <= self.limit / CROWDED.1 * CROWDED.0 {
            return Vec::new();
        }
        let share = |(session, holder): (&SessionId, &Holder)| (*session, holder.inos.len() / CROWDED.1);
        self.holders.iter().map(share).filter(|(_, count)| *count > 0).collect()
    }

    // ---- sessions ----

    /// A session takes leases, or says again after a lost stream or an election which ones it holds: those it does not name
    /// it has none of. What it names without right it is told to drop.
    pub fn assert_session(
        &mut self,
        session: SessionId,
        held: impl IntoIterator<Item = (InodeNo, Kind)>,
        now: Duration,
    ) {
        let notes = self.unclaimed.remove(&session);
        let new_here = notes.is_some();
        let holder = self.holders.entry(session);
        let holder =
            holder.or_insert_with(|| Holder { notes: notes.unwrap_or_default(), ..Holder::default() });
        let mut before = std::mem::take(&mut holder.inos);
        for (ino, kind) in held {
            let kind = match self.lease(session, ino) {
                Some(known) => Some(known.kind.min(kind)).filter(|_| before.remove(&ino)),
                None => Some(kind).filter(|kind| new_here && self.is_assertable(session, ino, *kind)),
            };
            let Some(kind) = kind else {
                self.actions.recalls.push(Recall { session, ino, grant: 0, keep: None });
                continue;
            };
            self.put(Lease { session, kind, sent: Some(kind), grant: 0, flushing: false }, ino);
            if let Some(recalled) = self.recalled.get_mut(&(session, ino)) {
                recalled.since = now;
                let recall = Recall { session, ino, grant: 0, keep: recalled.keep };
                self.actions.recalls.push(recall);
            }
        }
        for ino in &before {
            self.drop_lease(session, *ino);
        }
        for ino in before {
            self.settle(ino, now);
        }
        if new_here {
            self.settle_all(now);
        }
    }

    /// The session is gone, or takes no leases, with its leases and claims that wait. Changes that have passed last until they end: they may
    /// still be applied.
    pub fn end_session(&mut self, session: SessionId, now: Duration) {
        self.end_waiting(session, now);
        let inos = self.holders.remove(&session).map(|holder| holder.inos).unwrap_or_default();
        for ino in &inos {
            self.drop_lease(session, *ino);
        }
        for ino in inos {
            self.settle(ino, now);
        }
        if self.unclaimed.remove(&session).is_some() {
            self.settle_all(now);
        }
    }

    /// The claims of a session that wait are given up.
    pub fn end_waiting(&mut self, session: SessionId, now: Duration) {
        let waits = |claim: &Claim| claim.session == session && !claim.passed;
        let waiting: Vec<ClaimId> =
            self.claims.iter().filter(|(_, claim)| waits(claim)).map(|(id, _)| *id).collect();
        for id in waiting {
            self.end(id, now);
        }
    }

    /// Whether a claim has not ended.
    #[must_use]
    pub fn is_claim(&self, id: ClaimId) -> bool {
        self.claims.contains_key(&id)
    }

    /// Whether another session may buffer changes of an inode: what the state says of it may be old.
    #[must_use]
    pub fn is_hidden(&self, session: SessionId, ino: InodeNo) -> bool {
        self.writer(ino).is_some_and(|writer| writer != session)
            || self.unclaimed_bar(session, What::See, ino)
    }

    /// Whether another session may have changed an inode since then.
    #[must_use]
    pub fn has_changed(&self, session: SessionId, ino: InodeNo, since: Clock) -> bool {
        let stamp = self.stamps[stamp_of(ino)];
        let changed = if stamp.by == Some(session) { stamp.before } else { stamp.last };
        changed > since.0
    }

    /// The log has noted a bucket of a session.
    pub fn noted(&mut self, session: SessionId, kind: Kind, bucket: u32, now: Duration) {
        let Some(holder) = self.holders.get_mut(&session) else { return };
        holder.notes.add(kind, bucket);
        let takes = self
            .claims
            .values()
            .filter(|claim| claim.session == session && !claim.passed && matches!(claim.what, What::Take(_)));
        for ino in takes.flat_map(|claim| claim.inos.clone()).collect::<BTreeSet<_>>() {
            self.settle(ino, now);
        }
    }

    /// Sessions that were asked to give a lease back before `before` and were not seen to be at it since.
    #[must_use]
    pub fn overdue(&self, before: Duration) -> BTreeSet<SessionId> {
        let late = self.recalled.iter().filter(|(_, recalled)| recalled.since < before);
        late.map(|((session, _), _)| *session).collect()
    }

    /// Leases that somebody waits for since before `before`, and that their holders were never told of, end: the answers that
    /// were to tell of them are lost.
    pub fn end_untold(&mut self, before: Duration, now: Duration) {
        let late = self.recalled.iter().filter(|(_, recalled)| recalled.since < before).map(|(of, _)| *of);
        for (session, ino) in late.collect::<Vec<_>>() {
            if self.lease(session, ino).is_some_and(|lease| lease.sent.is_none()) {
                self.forget(session, ino, now);
            }
        }
    }

    /// A holder commits what it buffered of an inode: a recall of it goes on well.
    pub fn progress(&mut self, session: SessionId, ino: InodeNo, now: Duration) {
        if let Some(recalled) = self.recalled.get_mut(&(session, ino)) {
            recalled.since = now;
        }
    }

    // ---- leases ----

    /// Gives a lease if nothing is in the way and nobody has changed the inode since `seen`; it is to be sent with the answer
    /// that was looked up then. False: what the answer says must not be cached, or the session holds the lease already.
    #[must_use]
    pub fn grant(&mut self, session: SessionId, ino: InodeNo, kind: Kind, seen: Clock) -> bool {
        if !self.holders.contains_key(&session) || self.recalled.contains_key(&(session, ino)) {
            return false;
        }
        let held = self.held(session, ino);
        if held >= Some(kind)
            || self.has_changed(session, ino, seen)
            || (held.is_none() && self.total >= self.limit)
            || !(self.is_free(session, ino, kind) || defect::has(Defect::GrantedTwice))
            || !self.is_noted(session, ino, kind)
        {
            return false;
        }
        self.give(session, ino, kind);
        true
    }

    /// The answers that carry these grants are about to be sent. Says which of them hold, and under which number: leases
    /// that ended meanwhile are left out.
    pub fn sent(&mut self, session: SessionId, inos: &[InodeNo]) -> (u64, Vec<(InodeNo, Kind)>) {
        let number = self.next_grant;
        self.next_grant += 1;
        let mut grants = Vec::with_capacity(inos.len());
        for ino in inos {
            let Some(lease) = lease_mut(&mut self.nodes, session, *ino) else { continue };
            if lease.sent >= Some(lease.kind) {
                continue;
            }
            (lease.sent, lease.grant) = (Some(lease.kind), number);
            grants.push((*ino, lease.kind));
            if let Some(recalled) = self.recalled.get(&(session, *ino)) {
                self.actions.recalls.push(Recall { session, ino: *ino, grant: number, keep: recalled.keep });
            }
        }
        (number, grants)
    }

    /// A session and the master know both that a lease has ended: the inode lost its last name, and nobody has it open.
    pub fn forget(&mut self, session: SessionId, ino: InodeNo, now: Duration) {
        if self.lease(session, ino).is_some() {
            self.end_lease(session, ino);
            self.settle(ino, now);
        }
    }

    fn end_lease(&mut self, session: SessionId, ino: InodeNo) {
        self.drop_lease(session, ino);
        if let Some(holder) = self.holders.get_mut(&session) {
            holder.inos.remove(&ino);
        }
    }

    /// A session holds no more than `keep` of what it was given under this number. A later grant that it has not seen yet is
    /// not meant.
    pub fn returned(
        &mut self,
        session: SessionId,
        ino: InodeNo,
        grant: u64,
        keep: Option<Kind>,
        now: Duration,
    ) {
        let Some(lease) = lease_mut(&mut self.nodes, session, ino) else { return };
        if lease.grant != grant || lease.sent.is_none() {
            return;
        }
        match keep {
            Some(keep) => {
                lease.kind = lease.kind.min(keep);
                lease.sent = Some(lease.kind);
                if self.recalled.get(&(session, ino)).is_some_and(|recalled| recalled.keep >= Some(keep)) {
                    self.recalled.remove(&(session, ino));
                }
            }
            None => self.end_lease(session, ino),
        }
        self.settle(ino, now);
    }

    /// A session gives a lease back that is recalled, but commits something before. Those who do this on one inode do not wait
    /// for each other: they hold nothing that another one's commit could make old.
    pub fn flushing(&mut self, session: SessionId, ino: InodeNo, grant: u64, now: Duration) {
        let Some(lease) = lease_mut(&mut self.nodes, session, ino) else { return };
        if lease.grant == grant && lease.sent.is_some() {
            lease.flushing = true;
            self.settle(ino, now);
        }
    }

    // ---- claims ----

    /// Makes a claim. True: it has passed, and has ended if it is no change. Else it turns up in [`Actions::passed`].
    pub fn claim(
        &mut self,
        session: SessionId,
        what: What,
        mut inos: Vec<InodeNo>,
        now: Duration,
    ) -> (ClaimId, bool) {
        inos.sort_unstable();
        inos.dedup();
        let id = ClaimId(self.next_claim);
        self.next_claim += 1;
        for ino in &inos {
            self.nodes.entry(*ino).or_default().claims.push(id);
        }
        self.claims.insert(id, Claim { session, what, inos, passed: false });
        let passed = self.try_pass(id, now);
        if passed && what == What::See {
            // Whoever need not wait looks at once.
            self.remove(id);
        }
        (id, passed)
    }

    /// A change was applied, or will never be; a question is answered; a claim that waits is given up. One that has ended by
    /// itself is left alone.
    pub fn end(&mut self, id: ClaimId, now: Duration) {
        let Some(claim) = self.remove(id) else { return };
        if claim.what == What::Change && claim.passed {
            self.changes += 1;
            for ino in &claim.inos {
                let stamp = &mut self.stamps[stamp_of(*ino)];
                if stamp.by != Some(claim.session) {
                    (stamp.by, stamp.before) = (Some(claim.session), stamp.last);
                }
                stamp.last = self.changes;
            }
        }
        for ino in claim.inos {
            self.settle(ino, now);
        }
    }

    fn remove(&mut self, id: ClaimId) -> Option<Claim> {
        let claim = self.claims.remove(&id)?;
        for ino in &claim.inos {
            self.unclaim(*ino, id);
        }
        Some(claim)
    }

    /// Lets a claim pass if nothing is in its way; else asks for what is.
    fn try_pass(&mut self, id: ClaimId, now: Duration) -> bool {
        let Some(claim) = self.claims.get(&id) else { return false };
        let (session, what, inos) = (claim.session, claim.what, claim.inos.clone());
        let mut passes = true;
        for ino in &inos {
            if !self.is_its_turn(id, session, what, *ino) {
                passes = false;
                continue;
            }
            passes &= !self.recall_others(session, what, *ino, now);
            passes &= !self.unclaimed_bar(session, what, *ino);
            if let What::Take(kind) = what {
                passes &= self.is_noted(session, *ino, kind);
            }
        }
        if !passes {
            return false;
        }
        let What::Take(kind) = what else {
            if let Some(claim) = self.claims.get_mut(&id) {
                claim.passed = true;
            }
            return true;
        };
        self.remove(id);
        for ino in inos {
            if self.holders.contains_key(&session) && self.held(session, ino) < Some(kind) {
                self.give(session, ino, kind);
            }
        }
        true
    }

    /// Whether no earlier claim is to be waited for.
    fn is_its_turn(&self, id: ClaimId, session: SessionId, what: What, ino: InodeNo) -> bool {
        let Some(node) = self.nodes.get(&ino) else { return true };
        // Claims that want its lease back wait for the holder, not the other way round.
        if what == What::Change && node.leases.iter().any(|lease| lease.session == session) {
            return true;
        }
        node.claims.iter().all(|other| {
            let Some(claim) = self.claims.get(other) else { return true };
            // Of those that came later, changes of holders have passed all the same.
            let before = *other < id || claim.passed;
            !before || claim.session == session || !what.yields_to(claim.what)
        })
    }

    /// Recalls the leases of others that are in the way. True: there are some.
    fn recall_others(&mut self, session: SessionId, what: What, ino: InodeNo, now: Duration) -> bool {
        let Some(node) = self.nodes.get(&ino) else { return false };
        let mut barred = false;
        let keep = what.leaves();
        let own = node.leases.iter().find(|lease| lease.session == session);
        let both_flush = what == What::Change && own.is_some_and(|lease| lease.flushing);
        let bars = |lease: &&Lease| {
            lease.session != session && what.is_barred_by(lease.kind) && !(both_flush && lease.flushing)
        };
        for lease in node.leases.iter().filter(bars) {
            barred = true;
            let recalled = self.recalled.entry((lease.session, ino));
            let news = match recalled {
                std::collections::btree_map::Entry::Vacant(vacant) => {
                    vacant.insert(Recalled { keep, since: now });
                    true
                }
                std::collections::btree_map::Entry::Occupied(mut old) => {
                    let more = keep < old.get().keep;
                    if more {
                        old.get_mut().keep = keep;
                    }
                    more
                }
            };
            // A holder that was not told of it yet is asked for it right after.
            if news && lease.sent == Some(lease.kind) {
                self.actions.recalls.push(Recall { session: lease.session, ino, grant: lease.grant, keep });
            }
        }
        barred
    }

    /// Whether a session that has not said what it holds may be in the way.
    fn unclaimed_bar(&self, session: SessionId, what: What, ino: InodeNo) -> bool {
        let bucket = bucket_of(ino);
        let bars = |notes: &Notes| {
            [Kind::Read, Kind::Write]
                .into_iter()
                .any(|kind| what.is_barred_by(kind) && notes.of(kind).has(bucket))
        };
        // Where it may write itself, nobody else has anything.
        self.held(session, ino) != Some(Kind::Write)
            && self.unclaimed.iter().any(|(other, notes)| *other != session && bars(notes))
    }

    /// Whether a session could be given a lease at once.
    fn is_free(&self, session: SessionId, ino: InodeNo, kind: Kind) -> bool {
        if self.unclaimed_bar(session, What::Take(kind), ino) {
            return false;
        }
        let Some(node) = self.nodes.get(&ino) else { return true };
        let other = |lease: &Lease| lease.session != session && What::Take(kind).is_barred_by(lease.kind);
        let refused = |claim: &Claim| claim.session != session && !claim.what.lets_others_take(kind);
        !node.leases.iter().any(other)
            && !node.claims.iter().filter_map(|id| self.claims.get(id)).any(refused)
    }

    /// Whether a session may have been given a lease before the election: nothing in this term contradicts it.
    fn is_assertable(&self, session: SessionId, ino: InodeNo, kind: Kind) -> bool {
        let Some(node) = self.nodes.get(&ino) else { return true };
        let other = |lease: &Lease| lease.session != session && What::Take(kind).is_barred_by(lease.kind);
        let changed = |claim: &Claim| claim.session != session && claim.passed;
        !node.leases.iter().any(other)
            && !node.claims.iter().filter_map(|id| self.claims.get(id)).any(changed)
    }

    /// Whether the log knows that the session may hold such a lease here; if not, that is asked for.
    pub fn is_noted(&mut self, session: SessionId, ino: InodeNo, kind: Kind) -> bool {
        let Some(holder) = self.holders.get(&session) else { return true };
        let bucket = bucket_of(ino);
        if holder.notes.of(kind).has(bucket) {
            return true;
        }
        let note = (session, kind, bucket);
        if !self.actions.notes.contains(&note) {
            self.actions.notes.push(note);
        }
        false
    }

    fn settle_all(&mut self, now: Duration) {
        let busy: BTreeSet<InodeNo> =
            self.claims.values().flat_map(|claim| claim.inos.iter().copied()).collect();
        for ino in busy {
            self.settle(ino, now);
        }
    }

    /// Looks again at the claims of an inode, in their order.
    fn settle(&mut self, ino: InodeNo, now: Duration) {
        let Some(node) = self.nodes.get(&ino) else { return };
        if node.leases.is_empty() && node.claims.is_empty() {
            self.nodes.remove(&ino);
            return;
        }
        let waiting = |id: &ClaimId| self.claims.get(id).is_some_and(|claim| !claim.passed);
        let waiting: Vec<ClaimId> = node.claims.iter().copied().filter(waiting).collect();
        for id in waiting {
            if self.try_pass(id, now) {
                self.actions.passed.push(id);
            }
        }
    }

    fn lease(&self, session: SessionId, ino: InodeNo) -> Option<&Lease> {
        self.nodes.get(&ino)?.leases.iter().find(|lease| lease.session == session)
    }

    /// A session has a lease now that it is to be told of.
    fn give(&mut self, session: SessionId, ino: InodeNo, kind: Kind) {
        let before = self.lease(session, ino).copied();
        let (sent, grant) = before.map_or((None, 0), |lease| (lease.sent, lease.grant));
        self.put(Lease { session, kind, sent, grant, flushing: false }, ino);
    }

    fn put(&mut self, lease: Lease, ino: InodeNo) {
        let node = self.nodes.entry(ino).or_default();
        match node.leases.iter_mut().find(|held| held.session == lease.session) {
            Some(held) => *held = lease,
            None => {
                // Mostly there is one: the table is full of these.
                node.leases.reserve_exact(1);
                node.leases.push(lease);
                self.total += 1;
            }
        }
        if let Some(holder) = self.holders.get_mut(&lease.session) {
            holder.inos.insert(ino);
        }
    }

    fn drop_lease(&mut self, session: SessionId, ino: InodeNo) {
        self.recalled.remove(&(session, ino));
        let Some(node) = self.nodes.get_mut(&ino) else { return };
        let before = node.leases.len();
        node.leases.retain(|lease| lease.session != session);
        self.total -= before - node.leases.len();
        if node.leases.is_empty() && node.claims.is_empty() {
            self.nodes.remove(&ino);
        }
    }

    fn unclaim(&mut self, ino: InodeNo, id: ClaimId) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.claims.retain(|claim| *claim != id);
            if node.leases.is_empty() && node.claims.is_empty() {
                self.nodes.remove(&ino);
            }
        }
    }
}

fn lease_mut(nodes: &mut HashMap<InodeNo, Node>, session: SessionId, ino: InodeNo) -> Option<&mut Lease> {
    nodes.get_mut(&ino)?.leases.iter_mut().find(|lease| lease.session == session)
}

fn stamp_of(ino: InodeNo) -> usize {
    usize::try_from(ino.get() % STAMPS as u64).expect("below STAMPS")
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
