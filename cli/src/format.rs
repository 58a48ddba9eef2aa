//! How values look in tables and in JSON: modes, times, sizes, names.

use dfs_client::v1::{Attr, Kind, Timestamp};
use serde_json::{Value, json};

/// A name or path for people: bytes that are not UTF-8 and control characters are escaped, so that no name can move
/// the cursor.
pub fn name(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for part in bytes.utf8_chunks() {
        for character in part.valid().chars() {
            if character.is_control() {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        for byte in part.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// What kind of file, in one word.
pub fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Unspecified => "unknown",
        Kind::File => "file",
        Kind::Dir => "directory",
        Kind::Symlink => "symlink",
        Kind::Char => "character device",
        Kind::Block => "block device",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
    }
}

/// `drwxr-xr-x`, as ls(1) shows it.
pub fn mode(attr: &Attr) -> String {
    let letter = match attr.kind() {
        Kind::Unspecified => '?',
        Kind::File => '-',
        Kind::Dir => 'd',
        Kind::Symlink => 'l',
        Kind::Char => 'c',
        Kind::Block => 'b',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
    };
    let mut text = String::from(letter);
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = attr.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (attr.mode & special != 0, bits & 1 != 0) {
            (true, true) => set,
            (true, false) => unset,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// `1.5G`: at most four characters, rounded up as ls -h and df -h do.
pub fn size(bytes: u64) -> String {
    const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];
    if bytes < 1024 {
        return bytes.to_string();
    }
    let (mut unit, mut scale) = (0, 1024_u128);
    let bytes = u128::from(bytes);
    while bytes > scale * 1023 && unit + 1 < UNITS.len() {
        scale *= 1024;
        unit += 1;
    }
    let tenths = (bytes * 10).div_ceil(scale);
    if tenths < 100 {
        format!("{}.{}{}", tenths / 10, tenths % 10, UNITS[unit])
    } else {
        format!("{}{}", bytes.div_ceil(scale), UNITS[unit])
    }
}

/// `2026-11-21 06:01` in the user's time zone.
pub fn local_time(stamp: Option<Timestamp>) -> String {
    let stamp = stamp.unwrap_or_default();
    let (date, clock) = civil(stamp.seconds.saturating_add(zone_offset_s(stamp.seconds)));
    format!("{date} {}", &clock[..5])
}

/// `2026-11-21T06:01:39.000000123Z` (RFC 3339).
pub fn utc_time(stamp: Option<Timestamp>) -> String {
    let stamp = stamp.unwrap_or_default();
    let (date, clock) = civil(stamp.seconds);
    format!("{date}T{clock}.{:09}Z", stamp.nanos)
}

/// How many seconds local time is ahead of UTC at that moment.
fn zone_offset_s(seconds: i64) -> i64 {
    let mut parts = std::mem::MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are valid for the call; localtime_r keeps neither.
    let result = unsafe { libc::localtime_r(&raw const seconds, parts.as_mut_ptr()) };
    if result.is_null() {
        return 0;
    }
    // SAFETY: localtime_r did not fail, so it filled the structure (which was zeroed, a valid value, before).
    unsafe { parts.assume_init() }.tm_gmtoff
}

/// Date and time of day of seconds since 1970 in the proleptic Gregorian calendar (Howard Hinnant, "chrono-Compatible
/// Low-Level Date Algorithms", `civil_from_days`).
fn civil(seconds: i64) -> (String, String) {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (
        format!("{year:04}-{month:02}-{day:02}"),
        format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60),
    )
}

/// Milliseconds as people say them.
pub fn ago(ms: u64) -> String {
    match ms / 1000 {
        0 => "now".to_owned(),
        s if s < 120 => format!("{s} s ago"),
        s if s < 7200 => format!("{} min ago", s / 60),
        s => format!("{} h ago", s / 3600),
    }
}

/// A file's attributes for programs.
pub fn attr_json(path: &[u8], attr: &Attr, target: Option<&[u8]>) -> Value {
    let mut value = json!({
        "path": name_json(path),
        "ino": attr.ino, "kind": kind(attr.kind()), "mode": format!("{:04o}", attr.mode),
        "uid": attr.uid, "gid": attr.gid, "nlink": attr.nlink, "size": attr.size, "blocks": attr.blocks,
        "atime": utc_time(attr.atime), "mtime": utc_time(attr.mtime), "ctime": utc_time(attr.ctime),
        "btime": utc_time(attr.btime), "version": attr.version,
    });
    if attr.replicas != 0 {
        value["replicas"] = json!(attr.replicas);
    }
    if attr.chunk_size != 0 {
        value["chunk_size"] = json!(attr.chunk_size);
    }
    if let Some(target) = target {
        value["target"] = name_json(target);
    }
    value
}

/// A name in JSON: text, or an array of bytes when it is not UTF-8, so that no name is lost.
pub fn name_json(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_look_as_in_ls() {
        let shown = |kind: Kind, bits| mode(&Attr { kind: kind.into(), mode: bits, ..Attr::default() });
        assert_eq!(shown(Kind::File, 0o644), "-rw-r--r--");
        assert_eq!(shown(Kind::Dir, 0o1777), "drwxrwxrwt");
        assert_eq!(shown(Kind::File, 0o6755), "-rwsr-sr-x");
        assert_eq!(shown(Kind::File, 0o5600), "-rwS-----T");
    }

    #[test]
    fn sizes_take_four_characters() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1.0K"),
            (1025, "1.1K"),
            (10 << 10, "10K"),
            ((1 << 20) - 1, "1.0M"),
            (1 << 40, "1.0T"),
            (u64::MAX, "16E"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_before_1970_and_after_2038_are_right() {
        let shown = |seconds, nanos| utc_time(Some(Timestamp { seconds, nanos }));
        assert_eq!(shown(0, 1), "1970-01-01T00:00:00.000000001Z");
        assert_eq!(shown(-1, 0), "1969-12-31T23:59:59.000000000Z");
        assert_eq!(shown(951_782_400, 0), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(shown(4_102_444_800, 0), "2100-01-01T00:00:00.000000000Z");
    }

    #[test]
    fn no_name_can_move_the_cursor() {
        assert_eq!(name(b"a\x1b[2J\n\xffb"), "a\\u{1b}[2J\\n\\xffb");
        assert_eq!(name("grüße".as_bytes()), "grüße");
        assert_eq!(name_json(b"\xff"), json!([255]));
    }
}
