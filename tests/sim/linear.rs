//! Whether a history of one object could have happened in some order, one operation after the other, each between its call
//! and its return (Herlihy and Wing 1990). The search is Wing and Gong's with Lowe's memory of what was tried.
//!
//! An operation that nobody knows the end of (a time-out, a lost session) may have happened at any time after its call, or
//! not at all.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

/// What an object does.
pub trait Object: Clone + Debug {
    type State: Clone + Eq + Hash + Debug;
    type Op: Clone + Debug;
    type Result: Clone + PartialEq + Debug;

    fn initial() -> Self::State;

    /// What an operation does to the object, and what it answers.
    fn apply(state: &Self::State, op: &Self::Op) -> (Self::State, Self::Result);
}

/// One operation of one client.
#[derive(Clone, Debug)]
pub struct Event<O: Object> {
    pub client: u64,
    pub called: Duration,
    /// When it returned and with what; None: nobody knows.
    pub returned: Option<(Duration, O::Result)>,
    pub op: O::Op,
}

/// So many operations are shown in front of those that do not fit.
const LAST: usize = 12;

/// Checks a history.
///
/// # Errors
/// There is no such order: the longest beginnings of one, and the operations that do not fit behind it.
pub fn check<O: Object>(mut events: Vec<Event<O>>) -> Result<(), String> {
    events.sort_by_key(|event| event.called);
    let mut tried: HashSet<(Vec<u64>, O::State)> = HashSet::new();
    let mut path: Vec<(usize, O::State)> = Vec::new();
    let mut done = vec![0_u64; events.len().div_ceil(64)];
    let mut state = O::initial();
    let mut from = 0;
    let mut deepest: (Vec<usize>, Vec<usize>, O::State) = (Vec::new(), Vec::new(), state.clone());
    loop {
        let open = candidates(&events, &done);
        if open.iter().all(|at| events[*at].returned.is_none()) && rest_is_unknown(&events, &done) {
            return Ok(());
        }
        let step = open.iter().copied().filter(|at| *at >= from).find_map(|at| {
            let (next, result) = O::apply(&state, &events[at].op);
            let fits = events[at].returned.as_ref().is_none_or(|(_, seen)| *seen == result);
            if !fits {
                return None;
            }
            let mut with = done.clone();
            with[at / 64] |= 1 << (at % 64);
            tried.insert((with, next.clone())).then_some((at, next))
        });
        match step {
            Some((at, next)) => {
                done[at / 64] |= 1 << (at % 64);
                path.push((at, std::mem::replace(&mut state, next)));
                from = 0;
                if path.len() > deepest.0.len() {
                    let order = path.iter().map(|(at, _)| *at).collect();
                    deepest = (order, candidates(&events, &done), state.clone());
                }
            }
            None => {
                let Some((at, before)) = path.pop() else {
                    let (order, open, state) = deepest;
                    let show = |at: usize| {
                        let Event { client, called, returned, op } = &events[at];
                        format!("\n  client {client}: {op:?} called at {called:?}, returned {returned:?}")
                    };
                    let last: String =
                        order.iter().skip(order.len().saturating_sub(LAST)).map(|at| show(*at)).collect();
                    let open: String = open.into_iter().map(show).collect();
                    return Err(format!(
                        "no order: after{last}\n({} operations) the object is {state:?}, and none of these fits:{open}",
                        order.len()
                    ));
                };
                done[at / 64] &= !(1 << (at % 64));
                (state, from) = (before, at + 1);
            }
        }
    }
}

/// The operations that may come next: called before any other one returned.
fn candidates<O: Object>(events: &[Event<O>], done: &[u64]) -> Vec<usize> {
    let is_done = |at: usize| done[at / 64] & (1 << (at % 64)) != 0;
    let mut first_return = Duration::MAX;
    let mut open = Vec::new();
    for (at, event) in events.iter().enumerate().filter(|(at, _)| !is_done(*at)) {
        if event.called > first_return {
            break;
        }
        if let Some((returned, _)) = &event.returned {
            first_return = first_return.min(*returned);
        }
        open.push(at);
    }
    open.retain(|at| events[*at].called <= first_return);
    open
}

fn rest_is_unknown<O: Object>(events: &[Event<O>], done: &[u64]) -> bool {
    let is_done = |at: usize| done[at / 64] & (1 << (at % 64)) != 0;
    events.iter().enumerate().all(|(at, event)| is_done(at) || event.returned.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number that is written and read.
    #[derive(Clone, Debug)]
    struct Register;

    impl Object for Register {
        type State = u32;
        type Op = Option<u32>;
        type Result = u32;
        fn initial() -> u32 {
            0
        }
        fn apply(state: &u32, op: &Option<u32>) -> (u32, u32) {
            let now = op.unwrap_or(*state);
            (now, now)
        }
    }

    fn event(called: u64, returned: Option<u64>, op: Option<u32>, result: u32) -> Event<Register> {
        let at = Duration::from_secs;
        Event { client: 0, called: at(called), returned: returned.map(|time| (at(time), result)), op }
    }

    #[test]
    fn a_read_may_see_a_write_under_way_but_then_nobody_may_see_what_was_before() {
        let write = || event(1, Some(10), Some(7), 7);
        assert!(check(vec![write(), event(2, Some(3), None, 0), event(4, Some(5), None, 7)]).is_ok());
        assert!(check(vec![write(), event(2, Some(3), None, 7), event(4, Some(5), None, 0)]).is_err());
        assert!(check(vec![write(), event(11, Some(12), None, 0)]).is_err());
        assert!(check(vec![write(), event(2, Some(12), None, 0)]).is_ok());
    }

    #[test]
    fn what_nobody_knows_the_end_of_happens_later_or_never() {
        let maybe = || event(1, None, Some(7), 7);
        assert!(check(vec![maybe(), event(2, Some(3), None, 0), event(20, Some(21), None, 7)]).is_ok());
        assert!(check(vec![maybe(), event(2, Some(3), None, 0), event(20, Some(21), None, 0)]).is_ok());
        assert!(check(vec![maybe(), event(2, Some(3), None, 7), event(20, Some(21), None, 0)]).is_err());
        assert!(check(vec![event(0, Some(0), None, 7), maybe()]).is_err(), "not before it was called");
    }
}
