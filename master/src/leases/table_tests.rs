//! The table against three clients that believe what they are told, one message after the other.

use super::*;
use proptest::prelude::*;
use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

const SESSIONS: [SessionId; 3] = [SessionId(1), SessionId(2), SessionId(3)];
/// In two buckets.
const INOS: [InodeNo; 2] = [InodeNo(5), InodeNo(1000)];
const NOW: Duration = Duration::from_secs(1);

fn everywhere() -> Notes {
    let mut notes = Notes::default();
    for ino in INOS {
        notes.add(Kind::Read, bucket_of(ino));
        notes.add(Kind::Write, bucket_of(ino));
    }
    notes
}

fn table() -> Leases {
    let mut leases = Leases::new(1000, []);
    for session in SESSIONS {
        begin(&mut leases, session);
    }
    leases
}

fn begin(leases: &mut Leases, session: SessionId) {
    leases.assert_session(session, [], NOW);
    for (ino, kind) in INOS.into_iter().flat_map(|ino| [(ino, Kind::Read), (ino, Kind::Write)]) {
        leases.noted(session, kind, bucket_of(ino), NOW);
    }
}

// ---- what single steps do ----

#[test]
fn readers_share_and_a_change_waits_until_they_have_given_back() {
    let (mut leases, [a, b, c], [ino, _]) = (table(), SESSIONS, INOS);
    for session in [a, b] {
        assert!(leases.grant(session, ino, Kind::Read, leases.clock()));
        assert_eq!(leases.sent(session, &[ino]).1, [(ino, Kind::Read)]);
    }
    assert!(!leases.grant(a, ino, Kind::Read, leases.clock()), "it has one");
    assert!(!leases.grant(a, ino, Kind::Write, leases.clock()));
    let (change, passed) = leases.claim(c, What::Change, vec![ino], NOW);
    assert!(!passed);
    let recalls = leases.take_actions().recalls;
    assert_eq!(recalls.iter().map(|r| (r.session, r.keep)).collect::<Vec<_>>(), [(a, None), (b, None)]);
    assert!(!leases.grant(c, ino, Kind::Write, leases.clock()));
    leases.returned(a, ino, recalls[0].grant, None, NOW);
    assert!(!leases.grant(a, ino, Kind::Read, leases.clock()), "a change is under way");
    assert_eq!(leases.take_actions(), Actions::default());
    leases.returned(b, ino, recalls[1].grant, None, NOW);
    assert_eq!(leases.take_actions().passed, [change]);
    let before = leases.clock();
    leases.end(change, NOW);
    assert!(!leases.grant(a, ino, Kind::Read, before), "what was seen before is old");
    assert!(leases.grant(c, ino, Kind::Read, before), "its own change");
    assert!(leases.grant(a, ino, Kind::Read, leases.clock()));
}

#[test]
fn a_look_leaves_the_writer_a_read_lease_and_a_flush_passes_those_who_wait_for_it() {
    let (mut leases, [a, b, c], [ino, _]) = (table(), SESSIONS, INOS);
    let (_, passed) = leases.claim(a, What::Take(Kind::Write), vec![ino], NOW);
    assert!(passed && leases.writer(ino) == Some(a));
    let (look, passed) = leases.claim(b, What::See, vec![ino], NOW);
    assert!(!passed && leases.take_actions().recalls.is_empty(), "the holder does not know of its lease yet");
    let (grant, _) = leases.sent(a, &[ino]);
    assert_eq!(leases.take_actions().recalls, [Recall { session: a, ino, grant, keep: Some(Kind::Read) }]);
    let (take, passed) = leases.claim(c, What::Take(Kind::Write), vec![ino], NOW);
    assert!(!passed && leases.take_actions().recalls.is_empty(), "the question comes first");
    let (flush, passed) = leases.claim(a, What::Change, vec![ino], NOW);
    assert!(passed, "or nobody would ever go on");
    leases.end(flush, NOW);
    leases.returned(a, ino, grant, Some(Kind::Read), NOW);
    assert_eq!(leases.take_actions().passed, [look]);
    leases.returned(a, ino, grant, None, NOW);
    assert!(leases.take_actions().passed.is_empty(), "who asked has not looked yet");
    leases.end(look, NOW);
    assert_eq!(leases.take_actions().passed, [take]);
    assert_eq!((leases.writer(ino), leases.held(a, ino)), (Some(c), None));
}

#[test]
fn who_waits_is_not_overtaken() {
    let (mut leases, [a, b, c], [ino, _]) = (table(), SESSIONS, INOS);
    let (first, _) = leases.claim(a, What::Change, vec![ino], NOW);
    let (take, passed) = leases.claim(b, What::Take(Kind::Read), vec![ino], NOW);
    assert!(!passed);
    let (second, passed) = leases.claim(c, What::Change, vec![ino], NOW);
    assert!(!passed, "changes without end would keep the reader waiting for ever");
    leases.end(first, NOW);
    assert_eq!(leases.take_actions().passed, [take]);
    let (grant, _) = leases.sent(b, &[ino]);
    assert_eq!(leases.take_actions().recalls.len(), 1);
    leases.returned(b, ino, grant, None, NOW);
    assert_eq!(leases.take_actions().passed, [second]);
}

#[test]
fn an_old_return_does_not_end_a_new_lease() {
    let (mut leases, [a, ..], [ino, _]) = (table(), SESSIONS, INOS);
    assert!(leases.grant(a, ino, Kind::Read, leases.clock()));
    let (first, _) = leases.sent(a, &[ino]);
    assert!(leases.grant(a, ino, Kind::Write, leases.clock()));
    let (second, grants) = leases.sent(a, &[ino]);
    assert_eq!(grants, [(ino, Kind::Write)]);
    leases.returned(a, ino, first, None, NOW);
    assert_eq!(leases.held(a, ino), Some(Kind::Write));
    leases.returned(a, ino, second, None, NOW);
    assert_eq!((leases.held(a, ino), leases.total(), leases.count(a)), (None, 0, 0));
    assert!(leases.nodes.is_empty());
}

#[test]
fn nothing_is_given_beyond_the_limit_nor_before_the_log_knows() {
    let mut leases = Leases::new(1, []);
    let ([a, b, _], [ino, other]) = (SESSIONS, INOS);
    leases.assert_session(a, [], NOW);
    assert!(!leases.grant(a, ino, Kind::Read, leases.clock()));
    let (take, passed) = leases.claim(a, What::Take(Kind::Read), vec![ino], NOW);
    assert!(!passed);
    assert_eq!(leases.take_actions().notes, [(a, Kind::Read, bucket_of(ino))]);
    leases.noted(a, Kind::Read, bucket_of(ino), NOW);
    assert_eq!(leases.take_actions().passed, [take]);
    assert!(!leases.grant(a, other, Kind::Read, leases.clock()), "the table is full");
    assert!(!leases.grant(b, ino, Kind::Read, leases.clock()), "it takes no leases");
}

#[test]
fn a_full_table_asks_everybody_for_a_part() {
    let mut leases = Leases::new(100, []);
    for (session, count) in [(SESSIONS[0], 60), (SESSIONS[1], 30), (SESSIONS[2], 3)] {
        begin(&mut leases, session);
        assert!(leases.surplus().is_empty());
        for ino in (1..=count).map(InodeNo) {
            assert!(leases.grant(session, ino, Kind::Read, leases.clock()));
        }
    }
    assert_eq!(leases.surplus(), [(SESSIONS[0], 6), (SESSIONS[1], 3)]);
}

#[test]
fn after_an_election_only_what_a_silent_session_may_hold_waits_for_it() {
    let ([a, b, c], [ino, other]) = (SESSIONS, INOS);
    let mut notes = Notes::default();
    notes.add(Kind::Read, bucket_of(ino));
    let mut leases = Leases::new(1000, [(a, notes), (c, Notes::default())]);
    begin(&mut leases, b);
    leases.assert_session(b, [(other, Kind::Write)], NOW);
    assert_eq!(leases.take_actions().recalls.len(), 1, "it had no such lease");
    let (_, passed) = leases.claim(b, What::Change, vec![other], NOW);
    assert!(passed);
    let (_, passed) = leases.claim(b, What::See, vec![ino], NOW);
    assert!(passed, "nobody can have written there");
    let (change, passed) = leases.claim(b, What::Change, vec![ino], NOW);
    assert!(!passed);
    leases.assert_session(a, [(ino, Kind::Read), (other, Kind::Read)], NOW);
    let actions = leases.take_actions();
    assert!(actions.passed.is_empty());
    let recalled: Vec<InodeNo> = actions.recalls.iter().map(|recall| recall.ino).collect();
    assert_eq!(recalled, [other, ino], "one is being changed, one is to be changed");
    leases.end_session(a, NOW);
    assert_eq!(leases.take_actions().passed, [change]);
}

#[test]
fn a_session_that_does_not_give_back_is_overdue_unless_it_is_at_it() {
    let (mut leases, [a, b, _], [ino, _]) = (table(), SESSIONS, INOS);
    assert!(leases.grant(a, ino, Kind::Write, leases.clock()));
    leases.sent(a, &[ino]);
    leases.claim(b, What::See, vec![ino], NOW);
    assert!(leases.overdue(NOW).is_empty());
    assert_eq!(leases.overdue(NOW * 2), BTreeSet::from([a]));
    leases.progress(a, ino, NOW * 2);
    assert!(leases.overdue(NOW * 2).is_empty());
}

#[test]
fn a_writer_flushes_although_a_silent_session_may_hold_something_near() {
    let ([a, b, c], [ino, _]) = (SESSIONS, INOS);
    let mut near = Notes::default();
    near.add(Kind::Read, bucket_of(ino));
    let mut leases = Leases::new(1000, [(a, everywhere()), (c, near)]);
    leases.assert_session(a, [(ino, Kind::Write)], NOW);
    let (change, passed) = leases.claim(b, What::Change, vec![ino], NOW);
    assert!(!passed && leases.take_actions().recalls.len() == 1);
    let (flush, passed) = leases.claim(a, What::Change, vec![ino], NOW);
    assert!(passed, "nobody else can hold anything where it writes");
    leases.end(flush, NOW);
    leases.returned(a, ino, 0, None, NOW);
    assert!(leases.take_actions().passed.is_empty(), "it may have read the same before");
    leases.end_session(c, NOW);
    assert_eq!(leases.take_actions().passed, [change]);
}

#[test]
fn those_who_flush_before_they_give_back_do_not_wait_for_each_other() {
    let (mut leases, [a, b, c], [ino, _]) = (table(), SESSIONS, INOS);
    let mut grants = Vec::new();
    for session in [a, b] {
        assert!(leases.grant(session, ino, Kind::Read, leases.clock()));
        grants.push(leases.sent(session, &[ino]).0);
    }
    let (change, _) = leases.claim(c, What::Change, vec![ino], NOW);
    leases.flushing(a, ino, grants[0], NOW);
    let (flush, passed) = leases.claim(a, What::Change, vec![ino], NOW);
    assert!(!passed, "the other one may still believe in what it has");
    let (other, passed) = leases.claim(b, What::Change, vec![ino], NOW);
    assert!(!passed);
    assert!(leases.take_actions().passed.is_empty());
    leases.flushing(b, ino, grants[1], NOW);
    assert_eq!(leases.take_actions().passed, [flush, other]);
    for (session, grant, flush) in [(a, grants[0], flush), (b, grants[1], other)] {
        assert!(leases.take_actions().passed.is_empty(), "both come before what is to be made way for");
        leases.end(flush, NOW);
        leases.returned(session, ino, grant, None, NOW);
    }
    assert_eq!(leases.take_actions().passed, [change]);
}

#[test]
fn a_lease_that_nobody_was_told_of_does_not_hold_others_up_for_ever() {
    let (mut leases, [a, b, _], [ino, _]) = (table(), SESSIONS, INOS);
    assert!(leases.grant(a, ino, Kind::Read, leases.clock()));
    let (change, passed) = leases.claim(b, What::Change, vec![ino], NOW);
    assert!(!passed);
    leases.end_untold(NOW, NOW);
    assert!(leases.take_actions().passed.is_empty(), "the answer may be on its way");
    leases.end_untold(NOW * 2, NOW * 2);
    assert_eq!(leases.take_actions().passed, [change]);
    assert_eq!(leases.sent(a, &[ino]).1, [], "too late");
}

/// What a lease costs, with one holder an inode: the hash table grows by doubling and is at least 7/16 full, the set of a
/// session's inodes at least half, and an allocation takes 16 bytes more at most.
#[test]
fn size() {
    let node = size_of::<(InodeNo, Node)>() + 1;
    let table = node * 16 / 7;
    let entry = size_of::<Lease>() + 16;
    let index = size_of::<InodeNo>() * 2;
    assert!(table + entry + index <= 2 * BYTES_PER_LEASE, "{table} + {entry} + {index}");
}

// ---- any number of steps, in any order ----

#[derive(Clone, Debug)]
enum Step {
    /// A question: looks at the state, is granted a lease if possible.
    Ask(usize, usize, Kind),
    /// Makes a claim on one inode or both.
    Claim(usize, What, bool, bool),
    /// A change that has passed is applied, or anything else that waits is given up.
    End(usize),
    /// The oldest message to a client arrives.
    Deliver(usize),
    /// A client gives back what it was asked for, or what it holds on an inode.
    Return(usize, usize, bool),
    /// A client drops what it believes of an inode that it was asked for, to commit something before it gives it back.
    Flush(usize, usize),
    /// A client's stream breaks: messages are lost, and it says what it holds.
    Reattach(usize),
    /// A client is gone for good, and comes back as if new.
    Expire(usize),
    /// Another leader.
    Elect,
}

#[derive(Clone, Debug, Hash)]
enum Message {
    Grants(u64, Vec<(InodeNo, Kind, u64)>),
    Recall(Recall),
}

#[derive(Clone, Debug, Hash)]
struct Belief {
    kind: Kind,
    grant: u64,
    /// The version of the inode in its cache.
    version: u64,
    recalled: Option<Option<Kind>>,
    /// It is not believed any more, but not given back yet.
    flushing: bool,
}

/// The master, its clients and the messages between them.
struct World {
    leases: Leases,
    /// How often each inode was changed, and what each session did not see of it.
    versions: BTreeMap<InodeNo, u64>,
    beliefs: Vec<BTreeMap<InodeNo, Belief>>,
    inbox: Vec<VecDeque<Message>>,
    attached: Vec<bool>,
    /// Claims: who, what, on what, whether it has passed.
    claims: BTreeMap<ClaimId, (usize, What, Vec<InodeNo>, bool)>,
}

impl World {
    fn new() -> Self {
        Self {
            leases: table(),
            versions: INOS.iter().map(|ino| (*ino, 0)).collect(),
            beliefs: vec![BTreeMap::new(); 3],
            inbox: vec![VecDeque::new(); 3],
            attached: vec![true; 3],
            claims: BTreeMap::new(),
        }
    }

    fn act(&mut self) {
        loop {
            let actions = self.leases.take_actions();
            if actions == Actions::default() {
                return;
            }
            for (session, kind, bucket) in actions.notes {
                self.leases.noted(session, kind, bucket, NOW);
            }
            for id in actions.passed {
                self.passed(id);
            }
            for recall in actions.recalls {
                self.inbox[client(recall.session)].push_back(Message::Recall(recall));
            }
        }
    }

    fn passed(&mut self, id: ClaimId) {
        let (who, what, inos, passed) = self.claims.get_mut(&id).expect("only claims that were made pass");
        assert!(!*passed, "passed twice");
        *passed = true;
        let (who, what, inos) = (*who, *what, inos.clone());
        if !self.leases.is_claim(id) {
            self.claims.remove(&id);
        }
        if matches!(what, What::Take(_)) {
            self.send(who, &inos);
        }
    }

    /// Sends grants with what the state says now.
    fn send(&mut self, who: usize, inos: &[InodeNo]) {
        let (number, grants) = self.leases.sent(SESSIONS[who], inos);
        let grants = grants.into_iter().map(|(ino, kind)| (ino, kind, self.versions[&ino])).collect();
        self.inbox[who].push_back(Message::Grants(number, grants));
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Ask(who, ino, kind) => {
                let seen = self.leases.clock();
                if self.attached[who] && self.leases.grant(SESSIONS[who], INOS[ino], kind, seen) {
                    self.act();
                    self.send(who, &[INOS[ino]]);
                }
            }
            Step::Claim(who, what, first, second) if self.attached[who] && self.claims.len() < 6 => {
                let chosen = |both: bool, one: bool| match (both, one) {
                    (true, _) if what == What::Change => INOS.to_vec(),
                    (_, true) => vec![INOS[0]],
                    (_, false) => vec![INOS[1]],
                };
                let inos = chosen(first, second);
                let (id, passed) = self.leases.claim(SESSIONS[who], what, inos.clone(), NOW);
                self.claims.insert(id, (who, what, inos, false));
                if passed {
                    self.passed(id);
                }
            }
            Step::End(which) => {
                let Some(id) = self.claims.keys().nth(which).copied() else { return };
                let (who, what, inos, passed) = self.claims.remove(&id).expect("just found");
                if what == What::See && passed {
                    for ino in &inos {
                        assert!(!self.leases.is_hidden(SESSIONS[who], *ino), "asked, and not answered");
                    }
                }
                if what == What::Change && passed {
                    for ino in inos {
                        *self.versions.get_mut(&ino).expect("known") += 1;
                        // Whoever changes it knows what it is now, if he knew before.
                        if let Some(belief) = self.beliefs[who].get_mut(&ino) {
                            belief.version += 1;
                        }
                        for message in &mut self.inbox[who] {
                            if let Message::Grants(_, grants) = message {
                                let same = grants.iter_mut().filter(|grant| grant.0 == ino);
                                same.for_each(|grant| grant.2 += 1);
                            }
                        }
                    }
                }
                self.leases.end(id, NOW);
            }
            Step::Deliver(who) => match self.inbox[who].pop_front() {
                Some(Message::Grants(grant, grants)) => {
                    for (ino, kind, version) in grants {
                        self.beliefs[who]
                            .insert(ino, Belief { kind, grant, version, recalled: None, flushing: false });
                    }
                }
                Some(Message::Recall(recall)) => {
                    let belief = self.beliefs[who].get_mut(&recall.ino);
                    if let Some(belief) = belief.filter(|belief| belief.grant == recall.grant) {
                        belief.recalled = Some(recall.keep);
                    }
                }
                None => {}
            },
            Step::Return(who, ino, unasked) => {
                let ino = INOS[ino];
                let Some(belief) = self.beliefs[who].get_mut(&ino) else { return };
                if !self.attached[who] || (belief.recalled.is_none() && !unasked) {
                    return;
                }
                let (grant, keep) = (belief.grant, belief.recalled.take().flatten());
                match keep {
                    Some(keep) => belief.kind = belief.kind.min(keep),
                    None => drop(self.beliefs[who].remove(&ino)),
                }
                self.leases.returned(SESSIONS[who], ino, grant, keep, NOW);
            }
            Step::Flush(who, ino) => {
                let ino = INOS[ino];
                let belief = self.beliefs[who].get_mut(&ino);
                let asked = |belief: &&mut Belief| belief.recalled == Some(None) && belief.kind == Kind::Read;
                if let Some(belief) = belief.filter(asked).filter(|_| self.attached[who]) {
                    belief.flushing = true;
                    self.leases.flushing(SESSIONS[who], ino, belief.grant, NOW);
                }
            }
            Step::Reattach(who) => self.reattach(who),
            Step::Expire(who) => {
                self.beliefs[who].clear();
                self.inbox[who].clear();
                self.attached[who] = true;
                self.claims.retain(|_, (of, _, _, passed)| *of != who || *passed);
                self.leases.end_session(SESSIONS[who], NOW);
                begin(&mut self.leases, SESSIONS[who]);
            }
            Step::Elect => {
                self.leases = Leases::new(1000, SESSIONS.map(|session| (session, everywhere())));
                self.claims.clear();
                self.attached = vec![false; 3];
            }
            Step::Claim(..) => {}
        }
        self.act();
    }

    fn reattach(&mut self, who: usize) {
        self.inbox[who].clear();
        self.attached[who] = true;
        // What it was still to be answered it asks again.
        let waiting = self
            .claims
            .iter()
            .filter(|(_, (of, what, _, passed))| *of == who && !(*passed && *what == What::Change));
        for id in waiting.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.claims.remove(&id);
            self.leases.end(id, NOW);
        }
        self.act();
        self.inbox[who].clear();
        self.beliefs[who].retain(|_, belief| !belief.flushing);
        let held: Vec<(InodeNo, Kind)> = self.beliefs[who].iter().map(|(ino, b)| (*ino, b.kind)).collect();
        self.beliefs[who].values_mut().for_each(|belief| (belief.grant, belief.recalled) = (0, None));
        self.leases.assert_session(SESSIONS[who], held, NOW);
    }

    fn check(&self) {
        for ino in INOS {
            let believes = |who: usize| self.beliefs[who].get(&ino).filter(|belief| !belief.flushing);
            let believers: Vec<(usize, &Belief)> =
                (0..3).filter_map(|who| believes(who).map(|belief| (who, belief))).collect();
            if believers.iter().any(|(_, belief)| belief.kind == Kind::Write) {
                assert_eq!(
                    believers.len(),
                    1,
                    "somebody holds a write lease and is not alone: {believers:?}"
                );
            }
            for (who, belief) in &believers {
                assert_eq!(belief.version, self.versions[&ino], "client {who} caches what is old");
            }
            for (who, what, inos, passed) in self.claims.values() {
                let others = believers.iter().any(|(other, _)| other != who);
                assert!(
                    !(*passed && *what == What::Change && inos.contains(&ino) && others),
                    "a change passes while somebody caches the inode"
                );
            }
        }
        let total: usize = self.leases.nodes.values().map(|node| node.leases.len()).sum();
        assert_eq!(total, self.leases.total());
        assert_eq!(total, SESSIONS.iter().map(|session| self.leases.count(*session)).sum::<usize>());
        for (session, ino) in self.leases.recalled.keys() {
            assert!(self.leases.lease(*session, *ino).is_some(), "recalled from somebody who has nothing");
        }
        for (session, ino) in SESSIONS.into_iter().flat_map(|session| INOS.map(|ino| (session, ino))) {
            let (_, passes) = self.leases.clone().claim(session, What::See, vec![ino], NOW);
            assert_eq!(passes, !self.leases.is_hidden(session, ino), "who need not wait finds an answer");
        }
    }

    /// Everybody does what he is asked for: then nobody may be left waiting.
    fn finish(&mut self) {
        for who in 0..3 {
            if !self.attached[who] {
                self.step(&Step::Reattach(who));
            }
        }
        for _ in 0..200 {
            for who in 0..3 {
                while !self.inbox[who].is_empty() {
                    self.step(&Step::Deliver(who));
                    self.check();
                }
                for ino in 0..2 {
                    self.step(&Step::Return(who, ino, false));
                    self.check();
                }
            }
            match self.claims.values().position(|(_, _, _, passed)| *passed) {
                Some(at) => self.step(&Step::End(at)),
                None if self.claims.is_empty() && self.inbox.iter().all(VecDeque::is_empty) => return,
                None => {}
            }
            self.check();
        }
        panic!("some wait for ever: {:?}", self.claims);
    }

    /// Everything that decides what can happen next.
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let claims: Vec<_> = self.claims.iter().collect();
        let nodes: Vec<_> = INOS.iter().map(|ino| self.leases.nodes.get(ino)).collect();
        format!("{nodes:?}{:?}{:?}", self.leases.recalled, self.leases.unclaimed.keys()).hash(&mut hasher);
        format!("{claims:?}").hash(&mut hasher);
        (&self.beliefs, &self.inbox, &self.attached).hash(&mut hasher);
        hasher.finish()
    }
}

fn client(session: SessionId) -> usize {
    SESSIONS.iter().position(|other| *other == session).expect("one of them")
}

fn what() -> impl Strategy<Value = What> {
    prop_oneof![
        2 => Just(What::Change),
        1 => Just(What::See),
        1 => Just(What::Take(Kind::Read)),
        1 => Just(What::Take(Kind::Write)),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![2 => Just(Kind::Read), 1 => Just(Kind::Write)]
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3_usize, 0..2_usize, kind()).prop_map(|(who, ino, kind)| Step::Ask(who, ino, kind)),
        6 => (0..3_usize, what(), any::<bool>(), any::<bool>())
            .prop_map(|(who, what, both, one)| Step::Claim(who, what, both, one)),
        5 => (0..6_usize).prop_map(Step::End),
        9 => (0..3_usize).prop_map(Step::Deliver),
        7 => (0..3_usize, 0..2_usize, prop::bool::weighted(0.2))
            .prop_map(|(who, ino, unasked)| Step::Return(who, ino, unasked)),
        2 => (0..3_usize, 0..2_usize).prop_map(|(who, ino)| Step::Flush(who, ino)),
        1 => (0..3_usize).prop_map(Step::Reattach),
        1 => (0..3_usize).prop_map(Step::Expire),
        1 => Just(Step::Elect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn nobody_caches_what_is_old_and_nobody_waits_for_ever(steps in prop::collection::vec(steps(), 1..120)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
            world.check();
        }
        world.finish();
    }
}

/// Every order of a few steps, without crashes: every state that is reached is checked and brought to its end.
#[test]
fn every_short_interleaving_of_three_clients_and_two_inodes() {
    let mut all = Vec::new();
    for who in 0..3 {
        for ino in 0..2 {
            all.push(Step::Ask(who, ino, Kind::Read));
            all.push(Step::Claim(who, What::Take(Kind::Write), false, ino == 0));
            all.push(Step::Return(who, ino, false));
        }
        all.push(Step::Claim(who, What::Change, true, true));
        all.push(Step::Claim(who, What::See, false, true));
        all.push(Step::Deliver(who));
    }
    all.extend((0..2).map(Step::End));
    let mut seen = HashSet::new();
    let mut paths: Vec<Vec<Step>> = vec![Vec::new()];
    let replay = |path: &[Step]| {
        let mut world = World::new();
        path.iter().for_each(|step| world.step(step));
        world
    };
    for _ in 0..4 {
        let mut longer = Vec::new();
        for path in &paths {
            for step in &all {
                let mut world = replay(path);
                world.step(step);
                world.check();
                if seen.insert(world.fingerprint()) {
                    longer.push([path.as_slice(), std::slice::from_ref(step)].concat());
                    world.finish();
                }
            }
        }
        paths = longer;
    }
    assert!(seen.len() > 5_000, "only {} states", seen.len());
}
