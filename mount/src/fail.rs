//! Why dfs-mount ends: one line for the user and an exit status.

use std::fmt;

/// One line and an exit status: 2 for input that makes no sense, 1 for an operation that failed.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    pub status: u8,
    pub line: String,
}

impl Failure {
    /// The input makes no sense.
    pub fn usage(line: impl fmt::Display) -> Self {
        Self { status: 2, line: one_line(&line) }
    }

    /// The operation failed.
    pub fn operation(line: impl fmt::Display) -> Self {
        Self { status: 1, line: one_line(&line) }
    }
}

fn one_line(text: &impl fmt::Display) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}
