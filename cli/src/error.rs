//! Why a command failed: one line for the user and an exit status.

use dfs_client::FsError;
use dfs_proto::error::ErrorCode;
use std::fmt::Display;
use std::io;

/// Why a command failed.
#[derive(Debug)]
pub enum CliError {
    /// The command line or the settings make no sense. Exit status 2.
    Usage(String),
    /// The operation failed. Exit status 1.
    Failed(String),
    /// Some of several operations failed and have been reported already. Exit status 1.
    Reported,
    /// Whoever read our output has gone. Exit status as if SIGPIPE had ended us.
    Pipe,
    /// The user interrupted. Exit status as if SIGINT had ended us.
    Interrupted,
}

impl CliError {
    /// What to tell the user.
    pub fn line(&self) -> Option<&str> {
        match self {
            Self::Usage(line) | Self::Failed(line) => Some(line),
            Self::Interrupted => Some("interrupted"),
            Self::Reported | Self::Pipe => None,
        }
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) | Self::Reported => 1,
            Self::Pipe => 128 + 13,
            Self::Interrupted => 128 + 2,
        }
    }

    /// An operation on `subject` failed.
    pub fn failed(subject: impl Display, cause: impl Display) -> Self {
        Self::Failed(format!("{subject}: {cause}"))
    }
}

/// Says what the error is about.
pub trait About<T> {
    /// Puts `subject` in front of the cause.
    fn about(self, subject: impl Display) -> Result<T, CliError>;
}

impl<T> About<T> for Result<T, FsError> {
    fn about(self, subject: impl Display) -> Result<T, CliError> {
        self.map_err(|error| CliError::failed(subject, reason(&error)))
    }
}

impl<T> About<T> for io::Result<T> {
    fn about(self, subject: impl Display) -> Result<T, CliError> {
        self.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => CliError::Pipe,
            _ => CliError::failed(subject, plain(&error)),
        })
    }
}

/// "Permission denied", without the number that the standard library adds.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// The words that the shell's tools use, and the cause when there is more to say.
pub fn reason(error: &FsError) -> String {
    let words = match error.code {
        ErrorCode::ErrorNotFound => "No such file or directory",
        ErrorCode::ErrorExists => "File exists",
        ErrorCode::ErrorNotDir => "Not a directory",
        ErrorCode::ErrorIsDir => "Is a directory",
        ErrorCode::ErrorNotEmpty => "Directory not empty",
        ErrorCode::ErrorAccess => "Permission denied",
        ErrorCode::ErrorNotPermitted => "Operation not permitted",
        ErrorCode::ErrorNameTooLong => "File name too long",
        ErrorCode::ErrorNoSpace => "No space left",
        ErrorCode::ErrorLoop => "Too many levels of symbolic links",
        ErrorCode::ErrorInvalid => "Invalid argument",
        _ => return error.to_string(),
    };
    if error.message.is_empty() { words.to_owned() } else { format!("{words} ({})", error.message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_like_those_of_the_shells_tools() {
        let missing: Result<(), FsError> = Err(ErrorCode::ErrorNotFound.into());
        let error = missing.about("/a").expect_err("failed");
        assert_eq!(error.line(), Some("/a: No such file or directory"));
        assert_eq!(error.status(), 1);
        let io: io::Result<()> = Err(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(io.about("b").expect_err("failed").line(), Some("b: Permission denied"));
        let pipe: io::Result<()> = Err(io::ErrorKind::BrokenPipe.into());
        assert!(matches!(pipe.about("b"), Err(CliError::Pipe)));
    }
}
