//! What `/proc` says about the threads whose requests we hold: their groups, and the signals that wait for them.

use dfs_proto::limits;

/// A thread's state as far as it decides whether its request is given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// Signals that wait, for the thread or its process; bit `n - 1` stands for signal `n`.
    pub pending: u64,
    pub blocked: u64,
    /// Those that have a handler.
    pub caught: u64,
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

impl Signals {
    /// Nothing the thread could still do matters: SIGKILL waits.
    #[must_use]
    pub const fn killed(self) -> bool {
        self.pending & bit(libc::SIGKILL) != 0
    }

    /// A system call that may be interrupted would return: something waits that is neither blocked nor merely stops the
    /// process for a while.
    #[must_use]
    pub const fn interrupted(self) -> bool {
        let stops = bit(libc::SIGSTOP)
            | bit(libc::SIGTSTP)
            | bit(libc::SIGTTIN)
            | bit(libc::SIGTTOU)
            | bit(libc::SIGCONT);
        self.killed() || self.pending & !self.blocked & !(stops & !self.caught) != 0
    }
}

/// The signals in the text of `/proc/TID/status`; `None` when it is not such a text.
#[must_use]
pub fn parse_signals(status: &str) -> Option<Signals> {
    let mask = |key: &str| u64::from_str_radix(field(status, key)?, 16).ok();
    Some(Signals {
        pending: mask("SigPnd:")? | mask("ShdPnd:")?,
        blocked: mask("SigBlk:")?,
        caught: mask("SigCgt:")?,
    })
}

/// Whether the text of `/proc/filesystems` is of a kernel that runs SELinux.
#[must_use]
pub fn parse_has_selinux(filesystems: &str) -> bool {
    filesystems.lines().any(|line| line.split_ascii_whitespace().last() == Some("selinuxfs"))
}

/// Whether this kernel runs SELinux; when that cannot be told, it may.
#[must_use]
pub fn has_selinux() -> bool {
    std::fs::read_to_string("/proc/filesystems").map_or(true, |text| parse_has_selinux(&text))
}

/// The supplementary groups in the text of `/proc/TID/status`.
#[must_use]
pub fn parse_groups(status: &str) -> Vec<u32> {
    let groups = field(status, "Groups:").unwrap_or_default();
    groups.split_ascii_whitespace().filter_map(|group| group.parse().ok()).take(limits::GROUPS_MAX).collect()
}

/// Whether the text of `/proc/TID/stat` is of a process that SIGKILL is ending: its signal is no longer pending, but
/// nobody will look at the result of closing its files.
#[must_use]
pub fn parse_dying(stat: &str) -> bool {
    /// PF_EXITING of linux/sched.h.
    const EXITING: u64 = 0x4;
    // The name in parentheses may hold blanks and parentheses of its own: count from the last one.
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // proc(5): (9) flags and (52) exit_code; `rest` begins with (3).
    let number = |index: usize| fields.get(index - 3).and_then(|text| text.parse::<u64>().ok());
    number(9).is_some_and(|flags| flags & EXITING != 0)
        && number(52).is_some_and(|code| code & 0x7f == libc::SIGKILL.unsigned_abs().into())
}

fn field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// The signals of a thread; `None` when it is gone.
#[must_use]
pub fn signals(thread: u32) -> Option<Signals> {
    parse_signals(&std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?)
}

/// Whether SIGKILL is ending a thread.
#[must_use]
pub fn dying(thread: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{thread}/stat")).is_ok_and(|stat| parse_dying(&stat))
}

/// The supplementary groups of a thread, as they are now; none when it is gone or of another pid namespace.
#[must_use]
pub fn groups(thread: u32) -> Vec<u32> {
    if thread == 0 {
        return Vec::new();
    }
    std::fs::read_to_string(format!("/proc/{thread}/status"))
        .map(|status| parse_groups(&status))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(pending: u64, shared: u64, blocked: u64, caught: u64) -> String {
        format!(
            "Name:\ta (b) Groups: 9\nGroups:\t4 24 1000 \nSigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\n\
             SigBlk:\t{blocked:016x}\nSigIgn:\t0000000000001000\nSigCgt:\t{caught:016x}\n"
        )
    }

    #[test]
    fn groups_and_signals_are_read_from_status() {
        let text = status(1 << 8, 1 << 1, 3, 4);
        assert_eq!(parse_groups(&text), [4, 24, 1000]);
        assert_eq!(parse_signals(&text), Some(Signals { pending: 0x102, blocked: 3, caught: 4 }));
        assert_eq!(parse_groups("Groups:\t\n"), Vec::<u32>::new());
        assert_eq!(parse_signals("Name: x\n"), None);
    }

    #[test]
    fn selinux_is_found_among_the_file_systems() {
        assert!(parse_has_selinux("nodev\tsysfs\nnodev\tselinuxfs\n\text4\n"));
        assert!(!parse_has_selinux("nodev\tsysfs\n\text4\n"));
    }

    #[test]
    fn sigkill_always_counts_others_only_when_they_would_interrupt() {
        let of = |pending, blocked, caught| Signals { pending, blocked, caught };
        assert!(of(bit(libc::SIGKILL), u64::MAX, 0).killed());
        assert!(!of(bit(libc::SIGINT), 0, 0).killed());
        assert!(of(bit(libc::SIGINT), 0, 0).interrupted());
        assert!(!of(bit(libc::SIGINT), bit(libc::SIGINT), 0).interrupted());
        assert!(!of(bit(libc::SIGTSTP), 0, 0).interrupted());
        assert!(of(bit(libc::SIGTSTP), 0, bit(libc::SIGTSTP)).interrupted());
        assert!(!of(0, 0, 0).interrupted());
    }

    #[test]
    fn a_process_that_ends_by_sigkill_is_told_from_one_that_ends_by_itself() {
        let stat = |flags: u64, code: u64| {
            let between = "0 ".repeat(42);
            format!("77 (a ) b) D 1 1 1 0 -1 {flags} {between}{code}\n")
        };
        assert!(parse_dying(&stat(0x0040_0004, 9)));
        assert!(!parse_dying(&stat(0x0040_0004, 0)));
        assert!(!parse_dying(&stat(0x0040_0000, 9)));
        assert!(!parse_dying(""));
    }

    #[test]
    fn the_own_process_is_readable() {
        let own = std::process::id();
        assert!(signals(own).is_some_and(|signals| !signals.killed()));
        assert!(!dying(own));
        assert!(signals(u32::MAX).is_none());
        assert!(groups(0).is_empty());
    }
}
