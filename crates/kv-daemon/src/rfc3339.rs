//! Times as RFC 3339 writes them, in UTC. Years 1970 to 9999; leap seconds do not exist.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment, to the second: `2026-01-31T23:59:59Z`. Before 1970 it is 1970.
#[must_use]
pub fn format(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let rest = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Reads `YYYY-MM-DDTHH:MM:SS`, an optional fraction (dropped), and `Z` or an offset such as `+02:00`.
#[must_use]
pub fn parse(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    if bytes.len() < 20 || bytes[4] != b'-' || bytes[7] != b'-' || bytes[13] != b':' || bytes[16] != b':' {
        return None;
    }
    if !matches!(bytes[10], b'T' | b't' | b' ') {
        return None;
    }
    let year = digits(&bytes[0..4])?;
    let (month, day) = (digits(&bytes[5..7])?, digits(&bytes[8..10])?);
    let (hour, minute, second) = (
        digits(&bytes[11..13])?,
        digits(&bytes[14..16])?,
        digits(&bytes[17..19])?,
    );
    if year < 1970 || !(1..=12).contains(&month) || day < 1 || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    if day > days_in_month(year, month) {
        return None;
    }
    let mut zone = &bytes[19..];
    if let Some(fraction) = zone.strip_prefix(b".") {
        let length = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if length == 0 {
            return None;
        }
        zone = &fraction[length..];
    }
    let local = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    let seconds = match zone {
        b"Z" | b"z" => local,
        [sign @ (b'+' | b'-'), offset @ ..] if offset.len() == 5 && offset[2] == b':' => {
            let (hours, minutes) = (digits(&offset[..2])?, digits(&offset[3..])?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = hours * 3600 + minutes * 60;
            if *sign == b'+' {
                local.checked_sub(offset)?
            } else {
                local + offset
            }
        }
        _ => return None,
    };
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn digits(bytes: &[u8]) -> Option<u64> {
    bytes.iter().try_fold(0, |value, byte| {
        byte.is_ascii_digit().then(|| value * 10 + u64::from(byte - b'0'))
    })
}

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to this date, in the proleptic Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let before = |year: u64| year * 365 + year / 4 - year / 100 + year / 400;
    let months: u64 = (1..month).map(|month| days_in_month(year, month)).sum();
    before(year - 1) - before(1969) + months + day - 1
}

fn civil(mut days_left: u64) -> (u64, u64, u64) {
    // No more than a few steps: the estimate is late by a year at most.
    let mut year = 1970 + days_left / 366;
    while days(year + 1, 1, 1) <= days_left {
        year += 1;
    }
    days_left -= days(year, 1, 1);
    let mut month = 1;
    while days_left >= days_in_month(year, month) {
        days_left -= days_in_month(year, month);
        month += 1;
    }
    (year, month, days_left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn known_moments_are_written_and_read_back() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (253_402_300_799, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(format(at(seconds)), text);
            assert_eq!(parse(text), Some(at(seconds)), "{text}");
        }
        for day in 0..60_000 {
            assert_eq!(
                parse(&format(at(day * 86_400 + 7))),
                Some(at(day * 86_400 + 7)),
                "day {day}"
            );
        }
    }

    #[test]
    fn offsets_and_fractions_are_understood_and_nonsense_is_not() {
        assert_eq!(parse("1970-01-01T02:00:00.123+02:00"), Some(at(0)));
        assert_eq!(parse("1970-01-01T00:00:00-01:30"), Some(at(5400)));
        for wrong in [
            "",
            "2026-01-01",
            "2026-01-01T00:00:00",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00+2:00",
            "1969-12-31T23:59:59Z",
            "2026-01-01T00:00:00ZZ",
            "２026-01-01T00:00:00Z",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
