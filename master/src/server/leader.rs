//! What a master does while it leads, beside answering: sessions expire, orphans are freed, chunks sealed and dropped.

use super::jobs::Lane;
use super::term::{Answers, Term};
use super::{Gone, Shared, census, change, compacting, masters, repairing, sealing, space, wishing};
use crate::leases::table::Kind;
use crate::raft::Leadership;
use crate::state;
use dfs_proto::v1::{self, system};
use dfs_proto::{InodeNo, SessionId, limits};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How often silent sessions are looked for.
const EXPIRY_TICK: Duration = Duration::from_millis(250);
/// A leader that was not running for this long cannot tell who was silent meanwhile.
const STALL: Duration = Duration::from_secs(2);
/// What a session gets on top of its time to live: clients give up before the master does.
const EXPIRY_MARGIN: Duration = Duration::from_secs(2);
/// How long a session may take to give a lease back without any sign of being at it.
const RECALL_WAIT: Duration = Duration::from_millis(limits::RECALL_MS);
/// How often unused orphans are freed, and how many with one command.
const REAP_TICK: Duration = Duration::from_millis(50);
const REAP_BATCH: usize = 256;
/// How often the orphan table itself is looked through, for orphans whose answer was lost on the way.
const ORPHAN_SCAN: Duration = Duration::from_secs(60);
const ORPHAN_PAGE: usize = 1024;
/// How long to wait before taking office is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// Follows the leadership of this master until the process stops: one [`Term`] after the other.
pub async fn run(shared: Arc<Shared>) {
    let mut leadership = shared.node.leadership();
    let mut stopping = shared.stopping.subscribe();
    loop {
        if *stopping.borrow_and_update() {
            return;
        }
        let (leading, number) = {
            let now = leadership.borrow_and_update();
            (now.leading, now.term)
        };
        let term = if leading { begin(&shared, number).await } else { None };
        let mut work = JoinSet::new();
        if let Some(term) = &term {
            tracing::info!(term = number, "leading");
            shared.term.send_replace(Some(Arc::clone(term)));
            work.spawn(expire_sessions(Arc::clone(term)));
            work.spawn(note_leases(Arc::clone(term)));
            work.spawn(free_orphans(Arc::clone(term)));
            work.spawn(sealing::run(Arc::clone(term), Lane::Seals));
            work.spawn(sealing::run(Arc::clone(term), Lane::Replicas));
            work.spawn(repairing::run(Arc::clone(term)));
            work.spawn(space::run(Arc::clone(term)));
            work.spawn(compacting::run(Arc::clone(term)));
            work.spawn(wishing::run(Arc::clone(term)));
            work.spawn(census::run(Arc::clone(term)));
            work.spawn(masters::run(Arc::clone(term)));
        }
        let retry = leading && term.is_none();
        let changed = tokio::select! {
            // Only who leads in which term matters; other news of the group must not end a term.
            changed = wait_for_change(&mut leadership, leading, number) => changed,
            _ = stopping.changed() => true,
            () = tokio::time::sleep(RETRY), if retry => true,
            Some(end) = work.join_next(), if !work.is_empty() => {
                // Every task runs as long as the term does: this one lost the leadership before we heard of it, or
                // has a defect. Either way the term is not whole any more.
                if let Err(error) = end {
                    tracing::error!(%error, "a task of the leader ended");
                }
                tokio::time::sleep(RETRY).await;
                true
            }
        };
        if let Some(term) = term {
            tracing::info!(term = number, "not leading any more");
            shared.term.send_replace(None);
            term.end();
        }
        work.shutdown().await;
        if !changed {
            return;
        }
    }
}

/// Waits until this master begins or ceases to lead. False: Raft has stopped.
async fn wait_for_change(leadership: &mut watch::Receiver<Leadership>, leading: bool, number: u64) -> bool {
    let changed = leadership.wait_for(|now| now.leading != leading || (leading && now.term != number)).await;
    changed.is_ok()
}

async fn begin(shared: &Arc<Shared>, number: u64) -> Option<Arc<Term>> {
    match Term::begin(shared, number).await {
        Ok(Ok(term)) => Some(term),
        Ok(Err(error)) => {
            tracing::error!(term = number, %error, "cannot lead");
            None
        }
        Err(Gone { leader }) => {
            tracing::info!(term = number, leader, "lost the leadership at once");
            None
        }
    }
}

/// Has the log note where sessions are about to hold leases, many at a time.
async fn note_leases(term: Arc<Term>) {
    let wanted = Arc::clone(&term.memory().notes_wanted);
    loop {
        wanted.notified().await;
        let mut notes: BTreeMap<SessionId, v1::LeaseNote> = BTreeMap::new();
        for (session, kind, bucket) in term.memory().take_notes() {
            let note = notes.entry(session);
            let note = note.or_insert_with(|| v1::LeaseNote { session: session.get(), ..Default::default() });
            match kind {
                Kind::Read => note.read_buckets.push(bucket),
                Kind::Write => note.write_buckets.push(bucket),
            }
        }
        if notes.is_empty() {
            continue;
        }
        let note = v1::NoteLeases { notes: notes.into_values().collect() };
        let Ok(noted) = term.shared.system(system::Op::NoteLeases(note)).await else { return };
        if let Err(error) = &noted {
            tracing::error!(%error, "noting where leases are");
        }
        let now = term.now();
        term.memory().noted(noted.is_ok(), now);
    }
}

/// Closes sessions that were silent for too long, and cuts off those that do not give leases back.
async fn expire_sessions(term: Arc<Term>) {
    let ttl = term.shared.settings.session_ttl;
    let mut not_before = term.elected + ttl;
    let mut last = term.now();
    loop {
        tokio::time::sleep(EXPIRY_TICK).await;
        let now = term.now();
        if now.saturating_sub(last) > EXPIRY_TICK + STALL {
            tracing::warn!(
                stalled_ms = (now - last).as_millis(),
                "this master stood still: no session expires yet"
            );
            not_before = now + ttl;
        }
        last = now;
        term.memory().make_room();
        if now < not_before {
            continue;
        }
        {
            let mut memory = term.memory();
            let before = now.saturating_sub(RECALL_WAIT);
            memory.leases.end_untold(before, now);
            memory.dispatch();
            for id in memory.leases.overdue(before) {
                memory.fence(id);
            }
        }
        for id in silent(&term, now.saturating_sub(ttl + EXPIRY_MARGIN)) {
            if term.memory().sessions.get(&id).is_some_and(|session| !session.closing) {
                tracing::info!(session = %id, "a session expired");
            }
            if term.close_session(id, Answers::Keep).await.is_err() {
                return;
            }
        }
    }
}

fn silent(term: &Term, since: Duration) -> Vec<SessionId> {
    let memory = term.memory();
    memory.sessions.iter().filter(|(_, session)| session.seen < since).map(|(id, _)| *id).collect()
}

/// Frees inodes without a name that nobody holds open.
async fn free_orphans(term: Arc<Term>) {
    if term.reclaimed().await.is_err() {
        return;
    }
    let mut next_scan = term.now();
    loop {
        let now = term.now();
        if now >= next_scan {
            next_scan = now + ORPHAN_SCAN;
            scan_orphans(&term).await;
        }
        let batch = {
            let mut memory = term.memory();
            memory.release_abandoned(now.saturating_sub(term.shared.settings.session_ttl));
            memory.opens.take_unused(REAP_BATCH)
        };
        if reap(&term, &batch).await.is_err() {
            return;
        }
        if batch.len() < REAP_BATCH {
            tokio::time::sleep(REAP_TICK).await;
        }
    }
}

/// Frees inodes, large ones in steps: while it is going on nobody can open them.
async fn reap(term: &Arc<Term>, batch: &[InodeNo]) -> Result<(), Gone> {
    let mut left = batch.to_vec();
    // Whoever still caches what he saw of one is to find that it is gone.
    let _claim = if left.is_empty() { None } else { Some(change::Claim::of_the_cluster(term, &left).await?) };
    while !left.is_empty() {
        let reap = v1::Reap { inos: left.iter().map(|ino| ino.get()).collect() };
        if let Err(error) = term.shared.system(system::Op::Reap(reap)).await? {
            tracing::error!(%error, "freeing unnamed inodes");
            break;
        }
        let kv = term.kv();
        left.retain(|ino| match state::attr(&*kv, *ino) {
            // One that was given a name again in between is no orphan any more.
            Ok(attr) => attr.is_some_and(|attr| attr.nlink == 0),
            Err(error) => {
                super::store_failed("reading an inode", &error);
                false
            }
        });
    }
    term.memory().opens.reaped(batch);
    Ok(())
}

/// Tells the open table of every orphan there is.
async fn scan_orphans(term: &Term) {
    let mut after = InodeNo(0);
    loop {
        let page = match state::orphans(&*term.kv(), after, ORPHAN_PAGE) {
            Ok(page) => page,
            Err(error) => {
                super::store_failed("reading the orphans", &error);
                return;
            }
        };
        {
            let mut memory = term.memory();
            for ino in &page {
                memory.opens.orphaned(*ino);
            }
        }
        let Some(last) = page.last().filter(|_| page.len() == ORPHAN_PAGE) else { return };
        after = *last;
        tokio::task::yield_now().await;
    }
}
