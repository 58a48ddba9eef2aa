//! Deliberate defects: a test switches one on to see that its checker notices. Programs are built without the feature
//! `defects` and have none.

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// A client says that it has given a lease back, and goes on believing in it for a moment.
    LateInvalidation,
    /// A new leader waits for nobody who may hold leases.
    NoGrace,
    /// A lease is given although somebody else holds one that excludes it.
    GrantedTwice,
    /// A daemon says that an append is on disk before its fdatasync.
    AckBeforeSync,
    /// A daemon takes appends of an epoch that has ended.
    EpochUnchecked,
    /// A snapshot lacks the recorded answers that retries are recognised by.
    AnswersLost,
    /// The log is purged up to the newest snapshot, not up to the older of two.
    PurgedEarly,
    /// A client commits bytes that the daemons have, but not on their disks.
    CommittedUnsynced,
    /// A daemon that is told to fence cuts what it thinks superfluous, before any seal is committed.
    CutEarly,
    /// A daemon obeys the orders of a leader that was replaced.
    TermUnchecked,
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::LateInvalidation,
        Self::NoGrace,
        Self::GrantedTwice,
        Self::AckBeforeSync,
        Self::EpochUnchecked,
        Self::AnswersLost,
        Self::PurgedEarly,
        Self::CommittedUnsynced,
        Self::CutEarly,
        Self::TermUnchecked,
    ];
}

#[cfg(feature = "defects")]
thread_local! {
    static DEFECT: std::cell::Cell<Option<Defect>> = const { std::cell::Cell::new(None) };
}

/// Switches a defect on for everything that runs on this thread, or off.
#[cfg(feature = "defects")]
pub fn set(defect: Option<Defect>) {
    DEFECT.set(defect);
}

/// Whether this is to be done wrong.
#[cfg(feature = "defects")]
#[must_use]
pub fn has(defect: Defect) -> bool {
    DEFECT.get() == Some(defect)
}

/// Whether this is to be done wrong: never.
#[cfg(not(feature = "defects"))]
#[must_use]
pub const fn has(_: Defect) -> bool {
    false
}
