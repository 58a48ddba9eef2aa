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
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::LateInvalidation, Self::NoGrace, Self::GrantedTwice];
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
