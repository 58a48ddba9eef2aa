//! Every mutation happens once, whatever is retried (I6): answers are recorded by OpId = (session, sequence).
//!
//! ```text
//!   sequence  ──────────────|────────────────────────────▶
//!              forgotten    ^ floor    answers kept, with holes
//! ```
//!
//! The floor is the client's lowest unanswered sequence, and never more than DEDUP_WINDOW behind the newest one. Below it
//! nothing is remembered, so nothing may be done: such a command is refused. A change that an earlier session of the client may have
//! done has the answer of then, see `ended.rs`.

use super::ended::{self, Known};
use super::keys;
use super::ops::State;
use dfs_proto::limits::DEDUP_WINDOW;
use dfs_proto::v1::{self, ErrorCode, answer};
use dfs_proto::{FsError, SessionId};
use std::io;

/// Runs a mutation unless its OpId has an answer already.
pub fn once(
    state: &mut State<'_>,
    command: &v1::Command,
    run: impl FnOnce(&mut State<'_>) -> io::Result<v1::Answer>,
) -> io::Result<v1::Answer> {
    if command.session == 0 {
        return run(state);
    }
    let session = SessionId(command.session);
    let Some(mut row) = state.tx.find_session(session)? else {
        return Ok(failure(ErrorCode::ErrorSessionExpired, format!("session {session} does not exist")));
    };
    raise_floor(state, session, &mut row, command)?;
    if command.seq < row.lowest_unanswered {
        return Ok(failure(
            ErrorCode::ErrorConflict,
            format!("request {} was answered long ago", command.seq),
        ));
    }
    let key = keys::answer(session, command.seq);
    if let Some(recorded) = state.tx.row::<v1::Answer>(&key)? {
        return Ok(recorded);
    }
    let answer = match ended::known(state, &command.earlier, command.seq)? {
        Known::Answered(answer) => *answer,
        Known::Never => run(state)?,
        // It may be carried out yet: nothing is recorded, the client asks again.
        Known::NotYet => {
            let text = "a session in which the change was sent has not ended yet";
            return Ok(failure(ErrorCode::ErrorUnavailable, text.to_owned()));
        }
        Known::Forgotten => failure(
            ErrorCode::ErrorIo,
            "the session expired before the answer came, and is not remembered: the change may or may not have been made"
                .to_owned(),
        ),
    };
    state.tx.put_row(key, &answer);
    state.tx.keep();
    Ok(answer)
}

/// Forgets the answers that the client has.
fn raise_floor(
    state: &mut State<'_>,
    session: SessionId,
    row: &mut v1::SessionRow,
    command: &v1::Command,
) -> io::Result<()> {
    let floor = command.lowest_unanswered.max(command.seq.saturating_sub(DEDUP_WINDOW as u64));
    if floor <= row.lowest_unanswered {
        return Ok(());
    }
    let answered = keys::answers(session, row.lowest_unanswered, floor);
    for key in state.tx.collect(&answered, usize::MAX, |key, _| Ok(key.to_vec()))? {
        state.tx.delete(key);
    }
    row.lowest_unanswered = floor;
    state.tx.put_row(keys::session(session), row);
    state.tx.keep();
    Ok(())
}

fn failure(code: ErrorCode, message: String) -> v1::Answer {
    v1::Answer { body: Some(answer::Body::Failure(FsError::new(code, message).into())) }
}
