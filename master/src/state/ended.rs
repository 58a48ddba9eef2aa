//! What became of a change whose session ended before its client had the answer.
//!
//! The answers of a session that ends without a goodbye are kept. Nothing of an ended session is carried out any more (see
//! `dedup.rs`), so from its end on they say the whole truth: a sequence with an answer was done, one without never will be, and may
//! be done under the client's next session. Both the end and the question are commands of the log, which puts them in order.
//!
//! They are kept for ENDED_SESSION_KEPT_S, and for the ENDED_SESSIONS_MAX that ended last.

use super::keys::{self, tag};
use super::ops::State;
use super::rows::number;
use dfs_proto::SessionId;
use dfs_proto::limits::{ENDED_SESSION_KEPT_S, ENDED_SESSIONS_MAX};
use dfs_proto::v1::{self, Timestamp};
use std::io;

/// What the earlier sessions of a client know of a change.
pub enum Known {
    Answered(Box<v1::Answer>),
    /// None of them has carried it out, and none ever will.
    Never,
    /// One of them has not ended yet.
    NotYet,
    /// One of them is not remembered, or was never this client's.
    Forgotten,
}

/// What became of a change.
pub fn known(state: &State<'_>, earlier: &[v1::EarlierSession], seq: u64) -> io::Result<Known> {
    let mut known = Known::Never;
    for before in earlier {
        let session = SessionId(before.session);
        if let Some(row) = state.tx.find_session(session)? {
            known = if row.nonce == before.nonce { Known::NotYet } else { Known::Forgotten };
            continue;
        }
        let row: Option<v1::EndedRow> = state.tx.row(&keys::ended(session))?;
        match row.filter(|row| tells(row, before, seq)) {
            Some(_) => {
                if let Some(answer) = state.tx.row(&keys::answer(session, seq))? {
                    return Ok(Known::Answered(Box::new(answer)));
                }
            }
            None => return Ok(Known::Forgotten),
        }
    }
    Ok(known)
}

/// Whether what is kept of an ended session says what became of one of its changes.
#[must_use]
pub fn tells(row: &v1::EndedRow, before: &v1::EarlierSession, seq: u64) -> bool {
    row.nonce == before.nonce && row.lowest_unanswered <= seq
}

/// A session ends, and its answers stay.
pub fn keep(state: &mut State<'_>, session: SessionId, row: &v1::SessionRow) -> io::Result<()> {
    let ended =
        v1::EndedRow { nonce: row.nonce, lowest_unanswered: row.lowest_unanswered, ended: Some(state.now) };
    state.tx.put_row(keys::ended(session), &ended);
    state.tx.put(keys::ended_at(seconds(state.now), session), Vec::new());
    forget_oldest(state)
}

/// Whether the answers of an ended session are kept.
pub fn is_kept(state: &State<'_>, session: SessionId) -> io::Result<bool> {
    Ok(state.tx.get(&keys::ended(session))?.is_some())
}

/// When a session ended, as it is kept in order; 0 of one that does not say.
#[must_use]
pub fn second_of(row: &v1::EndedRow) -> u64 {
    row.ended.map_or(0, seconds)
}

fn seconds(time: Timestamp) -> u64 {
    u64::try_from(time.seconds).unwrap_or(0)
}

/// Forgets those that ended too long ago, and the oldest ones of too many.
fn forget_oldest(state: &mut State<'_>) -> io::Result<()> {
    let oldest =
        seconds(Timestamp { seconds: state.now.seconds.saturating_sub(ENDED_SESSION_KEPT_S), nanos: 0 });
    let kept = state.tx.collect(&keys::table(tag::ENDED_AT), usize::MAX, |key, _| {
        Ok((number(key, 0)?, SessionId(number(key, 1)?)))
    })?;
    let surplus = kept.len().saturating_sub(ENDED_SESSIONS_MAX);
    for (place, (ended, session)) in kept.into_iter().enumerate() {
        if place >= surplus && ended >= oldest {
            break;
        }
        state.tx.delete(keys::ended_at(ended, session));
        state.tx.delete(keys::ended(session));
        for key in state.tx.collect(&keys::answers_of(session), usize::MAX, |key, _| Ok(key.to_vec()))? {
            state.tx.delete(key);
        }
    }
    Ok(())
}
