//! The error of a file system operation: a code that decides what the caller can do, and the cause in words.

use crate::v1;
pub use crate::v1::ErrorCode;
use std::fmt;

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsError {
    /// What the caller can do about it; `mount/src/errno.rs` maps it to an errno.
    pub code: ErrorCode,
    /// The cause, for people. May be empty.
    pub message: String,
}

/// What operations on files return.
pub type FsResult<T> = Result<T, FsError>;

impl FsError {
    /// An error with its cause.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The same error, with what was being done in front of its cause.
    #[must_use]
    pub fn during(self, what: impl fmt::Display) -> Self {
        Self { message: format!("{what}: {self}"), ..self }
    }
}

impl From<ErrorCode> for FsError {
    fn from(code: ErrorCode) -> Self {
        Self { code, message: String::new() }
    }
}

impl From<v1::Failure> for FsError {
    fn from(failure: v1::Failure) -> Self {
        // A code of a newer peer is still a failure: it must never be read as success.
        let code = match ErrorCode::try_from(failure.code) {
            Ok(ErrorCode::ErrorOk) | Err(_) => ErrorCode::ErrorIo,
            Ok(code) => code,
        };
        Self { code, message: failure.message }
    }
}

impl From<FsError> for v1::Failure {
    fn from(error: FsError) -> Self {
        Self { code: error.code.into(), message: error.message }
    }
}

impl From<std::io::Error> for FsError {
    fn from(error: std::io::Error) -> Self {
        let code = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorCode::ErrorNoSpace,
            std::io::ErrorKind::TimedOut => ErrorCode::ErrorTimedOut,
            _ => ErrorCode::ErrorIo,
        };
        Self { code, message: error.to_string() }
    }
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            self.code.as_str_name().trim_start_matches("ERROR_").to_ascii_lowercase().replace('_', " ");
        if self.message.is_empty() { f.write_str(&name) } else { write!(f, "{} ({name})", self.message) }
    }
}

impl std::error::Error for FsError {}
