//! The one table from the error codes of dfs to the errno that a program sees.

use dfs_proto::v1::ErrorCode;
use fuser::Errno;

/// The errno of an error code. Exhaustive: a new code does not compile before somebody has decided here.
#[must_use]
pub fn errno(code: ErrorCode) -> Errno {
    match code {
        ErrorCode::ErrorNotFound => Errno::ENOENT,
        ErrorCode::ErrorExists => Errno::EEXIST,
        ErrorCode::ErrorNotDir => Errno::ENOTDIR,
        ErrorCode::ErrorIsDir => Errno::EISDIR,
        ErrorCode::ErrorNotEmpty => Errno::ENOTEMPTY,
        ErrorCode::ErrorAccess => Errno::EACCES,
        ErrorCode::ErrorNotPermitted => Errno::EPERM,
        ErrorCode::ErrorInvalid => Errno::EINVAL,
        ErrorCode::ErrorNameTooLong => Errno::ENAMETOOLONG,
        ErrorCode::ErrorTooManyLinks => Errno::EMLINK,
        ErrorCode::ErrorNoSpace => Errno::ENOSPC,
        ErrorCode::ErrorQuota => Errno::EDQUOT,
        ErrorCode::ErrorFileTooBig => Errno::EFBIG,
        ErrorCode::ErrorStale => Errno::ESTALE,
        ErrorCode::ErrorNoData => Errno::ENODATA,
        ErrorCode::ErrorRange => Errno::ERANGE,
        ErrorCode::ErrorNotSupported => Errno::EOPNOTSUPP,
        ErrorCode::ErrorReadOnly => Errno::EROFS,
        ErrorCode::ErrorBusy => Errno::EBUSY,
        ErrorCode::ErrorWouldBlock => Errno::EAGAIN,
        ErrorCode::ErrorDeadlock => Errno::EDEADLK,
        ErrorCode::ErrorInterrupted => Errno::EINTR,
        ErrorCode::ErrorTimedOut => Errno::ETIMEDOUT,
        ErrorCode::ErrorNoDeviceAddress => Errno::ENXIO,
        ErrorCode::ErrorTooBig => Errno::E2BIG,
        ErrorCode::ErrorNoLocks => Errno::ENOLCK,
        ErrorCode::ErrorCrossDevice => Errno::EXDEV,
        ErrorCode::ErrorLoop => Errno::ELOOP,
        ErrorCode::ErrorOverflow => Errno::EOVERFLOW,
        // `Ok` as an error is a fault. The client library answers the codes below itself; one that comes through means
        // that it gave up: bytes could not be written or read.
        ErrorCode::ErrorIo
        | ErrorCode::ErrorOk
        | ErrorCode::ErrorStaleEpoch
        | ErrorCode::ErrorSessionExpired
        | ErrorCode::ErrorNotLeader
        | ErrorCode::ErrorVersion
        | ErrorCode::ErrorWrongCluster
        | ErrorCode::ErrorBadToken
        | ErrorCode::ErrorCorrupt
        | ErrorCode::ErrorConflict
        | ErrorCode::ErrorUnavailable
        | ErrorCode::ErrorNoNodes
        | ErrorCode::ErrorNoChunk => Errno::EIO,
    }
}

/// Whether an error is a fault of the cluster and not an ordinary answer to a program: worth a line in the log.
#[must_use]
pub fn is_fault(code: ErrorCode) -> bool {
    matches!(errno(code).code(), libc::EIO | libc::ETIMEDOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_an_errno_and_only_faults_are_eio_or_a_time_out() {
        let mut faults = Vec::new();
        for number in 0..=255 {
            if let Ok(code) = ErrorCode::try_from(number) {
                assert!(errno(code).code() > 0);
                if is_fault(code) {
                    faults.push(number);
                }
            }
        }
        assert_eq!(faults, [0, 23, 24, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]);
        assert_eq!(errno(ErrorCode::ErrorNotFound).code(), libc::ENOENT);
        assert_eq!(errno(ErrorCode::ErrorNoDeviceAddress).code(), libc::ENXIO);
    }
}
