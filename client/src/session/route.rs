//! Which master to try next, and after how long.

use dfs_proto::error::ErrorCode;
use dfs_proto::{FsError, limits};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// While masters answer that they are electing a leader, that is over soon.
const ELECTION_PAUSE: Duration = Duration::from_millis(200);
/// How many times in a row one master may name another before that counts as a failure.
const REDIRECTS_MAX: u32 = 3;

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Tried {
    /// Nothing answered there, or nothing that made sense.
    Failed(String),
    /// A master answered that it does not lead.
    NotLeader(String),
    /// A master refused this client for good.
    Refused(FsError),
}

/// The masters' addresses and what came of trying them since the last success.
pub(super) struct Route {
    /// Those of the settings, which are tried whatever the cluster says.
    settings: Vec<String>,
    /// All that are tried, in turn: what the cluster said last comes first.
    masters: Vec<String>,
    next: usize,
    /// Where a master says the leader is.
    redirect: Option<String>,
    redirects: u32,
    failures: u32,
    tried: BTreeMap<String, Tried>,
    /// Masters of an earlier history, as was told.
    outdated: BTreeSet<String>,
    /// There was a session already: that a master refuses it may be a passing state of an upgrade.
    had_session: bool,
}

impl Route {
    pub fn new(masters: Vec<String>) -> Self {
        Self {
            settings: masters.clone(),
            masters,
            next: 0,
            redirect: None,
            redirects: 0,
            failures: 0,
            tried: BTreeMap::new(),
            outdated: BTreeSet::new(),
            had_session: false,
        }
    }

    /// The leader says who the masters are.
    pub fn learn(&mut self, masters: &[String]) {
        if !masters.is_empty() {
            let known = self.settings.clone();
            self.set(masters.iter().cloned().chain(known));
        }
    }

    /// A master that does not lead says who the masters are: it may be one that was removed, so nobody is forgotten for that.
    pub fn hear(&mut self, masters: &[String]) {
        let known = self.masters.clone();
        self.set(known.into_iter().chain(masters.iter().cloned()));
    }

    fn set(&mut self, masters: impl Iterator<Item = String>) {
        let mut all: Vec<String> = Vec::new();
        for address in masters.take(2 * limits::MASTER_ADDRESSES_MAX) {
            if all.len() < limits::MASTER_ADDRESSES_MAX && !address.is_empty() && !all.contains(&address) {
                all.push(address);
            }
        }
        if all != self.masters {
            self.masters = all;
            self.next %= self.masters.len();
        }
    }

    /// The next address and how long to wait before it is tried. `random` spreads clients that lost the same master.
    pub fn next(&mut self, random: u64) -> (String, Duration) {
        if let Some(leader) = self.redirect.take() {
            if self.redirects < REDIRECTS_MAX {
                self.redirects += 1;
                return (leader, Duration::ZERO);
            }
            self.redirects = 0;
            return (leader, self.pause(random));
        }
        let address = self.masters[self.next % self.masters.len()].clone();
        self.next = (self.next + 1) % self.masters.len();
        (address, self.pause(random))
    }

    /// The other masters, in the order in which they would be tried.
    pub fn others(&self, address: &str) -> Vec<String> {
        let count = self.masters.len();
        let all = (0..count).map(|place| &self.masters[(self.next + place) % count]);
        all.filter(|master| *master != address).cloned().collect()
    }

    fn pause(&self, random: u64) -> Duration {
        if self.failures == 0 {
            return Duration::ZERO;
        }
        let electing = self.tried.values().any(|tried| matches!(tried, Tried::NotLeader(_)));
        let longest = if electing { ELECTION_PAUSE } else { LONGEST_PAUSE };
        let pause = (FIRST_PAUSE * 2_u32.pow((self.failures - 1).min(8))).min(longest);
        // Between three quarters and all of it.
        pause * u32::try_from(192 + random % 65).unwrap_or(256) / 256
    }

    /// A stream was welcomed there and then lost. `short`: at once; trying again must not become a busy loop.
    pub fn lost(&mut self, short: bool) {
        self.had_session = true;
        self.tried.clear();
        self.redirects = 0;
        self.failures = u32::from(short);
    }

    pub fn failed(&mut self, address: &str, cause: String) {
        self.failures = self.failures.saturating_add(1);
        self.tried.insert(address.to_owned(), Tried::Failed(cause));
    }

    /// Whether it is yet to be told that a master is of an earlier history; from here on it is not.
    pub fn is_news(&mut self, address: &str) -> bool {
        self.outdated.len() < limits::MASTER_ADDRESSES_MAX && self.outdated.insert(address.to_owned())
    }

    /// A master refused the session. `leader`: where it says to go.
    pub fn refused(&mut self, address: &str, error: FsError, leader: Option<String>) {
        self.failures = self.failures.saturating_add(1);
        let tried = match error.code {
            ErrorCode::ErrorNotLeader => {
                self.redirect = leader.filter(|leader| leader != address);
                match &self.redirect {
                    Some(leader) => Tried::NotLeader(format!("does not lead; it names {leader}")),
                    None => Tried::NotLeader("does not lead; no leader is known".to_owned()),
                }
            }
            ErrorCode::ErrorVersion | ErrorCode::ErrorWrongCluster => Tried::Refused(error),
            _ => Tried::Failed(error.to_string()),
        };
        self.tried.insert(address.to_owned(), tried);
    }

    /// The error of a client that no master will ever take. At the first connect: every master was tried, and those
    /// that answered refused for good. Later every single one must have done so.
    pub fn hopeless(&self) -> Option<FsError> {
        let tried: Vec<_> = self.masters.iter().filter_map(|address| self.tried.get(address)).collect();
        let refused = |tried: &&Tried| matches!(tried, Tried::Refused(_));
        let open = |tried: &&Tried| match tried {
            Tried::Refused(_) => false,
            Tried::NotLeader(_) => true,
            Tried::Failed(_) => self.had_session,
        };
        if tried.len() < self.masters.len() || tried.iter().any(open) || !tried.iter().any(refused) {
            return None;
        }
        self.tried.iter().find_map(|(address, tried)| match tried {
            Tried::Refused(error) if error.message.is_empty() => Some(error.clone().during(address)),
            Tried::Refused(error) => Some(FsError::new(error.code, format!("{address}: {}", error.message))),
            _ => None,
        })
    }

    /// The addresses tried since the last success and what came of each, in one line.
    pub fn causes(&self) -> String {
        let cause = |(address, tried): (&String, &Tried)| match tried {
            // Most causes name the address themselves.
            Tried::Failed(cause) if cause.starts_with(address.as_str()) => cause.clone(),
            Tried::Failed(cause) | Tried::NotLeader(cause) => format!("{address}: {cause}"),
            Tried::Refused(error) => format!("{address}: {error}"),
        };
        let all: Vec<_> = self.tried.iter().map(cause).collect();
        if all.is_empty() { "no answer yet".to_owned() } else { all.join("; ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> Route {
        Route::new(["a:1", "b:1", "c:1"].map(str::to_owned).to_vec())
    }

    fn not_leader() -> FsError {
        ErrorCode::ErrorNotLeader.into()
    }

    #[test]
    fn addresses_take_turns_and_pauses_grow_to_a_second() {
        let mut route = route();
        let mut pauses = Vec::new();
        for expected in ["a:1", "b:1", "c:1", "a:1", "b:1", "c:1", "a:1", "b:1"] {
            let (address, pause) = route.next(64);
            assert_eq!(address, expected);
            pauses.push(pause.as_millis());
            route.failed(&address, "Connection refused".into());
        }
        assert_eq!(pauses, [0, 50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(
            route.causes(),
            "a:1: Connection refused; b:1: Connection refused; c:1: Connection refused"
        );
        route.lost(false);
        assert_eq!(route.next(64).1, Duration::ZERO);
    }

    #[test]
    fn an_outdated_master_is_told_once_and_there_is_a_bound_on_how_many_are() {
        let mut route = route();
        assert_eq!(
            ["a:1", "a:1", "b:1", "a:1"].map(|address| route.is_news(address)),
            [true, false, true, false]
        );
        let told = (0..100).filter(|n| route.is_news(&format!("m{n}:1"))).count();
        assert_eq!(told, limits::MASTER_ADDRESSES_MAX - 2);
    }

    #[test]
    fn the_others_follow_in_their_order() {
        let mut route = route();
        let (first, _) = route.next(64);
        assert_eq!((first.as_str(), route.others(&first)), ("a:1", vec!["b:1".to_owned(), "c:1".to_owned()]));
        let (second, _) = route.next(64);
        assert_eq!(route.others(&second), ["c:1", "a:1"]);
        assert_eq!(route.others("z:9").len(), 3, "a leader that was named and is not in the list");
    }

    #[test]
    fn a_named_leader_is_tried_at_once_but_not_for_ever() {
        let mut route = route();
        for _ in 0..REDIRECTS_MAX {
            let (address, _) = route.next(64);
            route.refused(&address, not_leader(), Some("z:9".into()));
            assert_eq!(route.next(64), ("z:9".into(), Duration::ZERO));
            route.failed("z:9", "z:9: gone".into());
        }
        route.refused("a:1", not_leader(), Some("z:9".into()));
        let (address, pause) = route.next(64);
        assert_eq!(address, "z:9");
        assert_eq!(pause, ELECTION_PAUSE, "masters answer, so an election is under way");
    }

    #[test]
    fn the_leaders_list_replaces_what_was_heard_and_the_settings_stay() {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let mut route = route();
        route.hear(&list(&["d:1", "a:1"]));
        assert_eq!(route.masters, list(&["a:1", "b:1", "c:1", "d:1"]));
        route.learn(&list(&["d:1", "e:1"]));
        assert_eq!(route.masters, list(&["d:1", "e:1", "a:1", "b:1", "c:1"]));
        route.learn(&list(&["e:1", "c:1"]));
        route.learn(&[]);
        assert_eq!(route.masters, list(&["e:1", "c:1", "a:1", "b:1"]));
        let many: Vec<String> = (0..100).map(|n| format!("m{n}:1")).collect();
        route.hear(&many);
        assert_eq!(route.masters.len(), limits::MASTER_ADDRESSES_MAX);
        for _ in 0..40 {
            let (address, _) = route.next(0);
            route.failed(&address, "gone".into());
        }
    }

    #[test]
    fn a_lasting_refusal_counts_when_nobody_else_may_say_otherwise() {
        let version = || FsError::new(ErrorCode::ErrorVersion, "protocol 1, this cluster speaks 2");
        let mut first = route();
        first.refused("a:1", version(), None);
        assert!(first.hopeless().is_none(), "the others were not asked yet");
        first.failed("b:1", "Connection refused".into());
        first.failed("c:1", "Connection refused".into());
        let error = first.hopeless().expect("hopeless");
        assert_eq!(error.to_string(), "a:1: protocol 1, this cluster speaks 2 (version)");
        first.refused("c:1", not_leader(), None);
        assert!(first.hopeless().is_none());
        let mut later = route();
        later.lost(false);
        later.refused("a:1", version(), None);
        later.failed("b:1", "Connection refused".into());
        later.refused("c:1", version(), None);
        assert!(later.hopeless().is_none(), "a master that is down may be the old one");
        later.refused("b:1", version(), None);
        assert!(later.hopeless().is_some());
    }
}
