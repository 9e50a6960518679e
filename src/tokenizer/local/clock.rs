//! `strftime_now` of transformers: today's date for templates that print it.
//!
//! Only what stays the same for a whole day is written, in UTC, which is the clock of an engine's container unless
//! someone set another. Around midnight the engine's clock may already, or still, say another day: then nothing is
//! written at all.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Two clocks may differ by this much.
const DOUBT: Duration = Duration::from_secs(5);
const DAY: u64 = 86_400;
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// `now` in `format`; none for what changes within a day, and around midnight.
pub(super) fn strftime(format: &str, now: SystemTime) -> Option<String> {
    let seconds = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
    let since_midnight = seconds % DAY;
    if since_midnight < DOUBT.as_secs() || since_midnight >= DAY - DOUBT.as_secs() {
        return None;
    }
    let date = Date::of_day(seconds / DAY);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c == '%' { date.write(&mut out, chars.next()?, &mut chars)? } else { out.push(c) }
    }
    Some(out)
}

struct Date {
    year: u64,
    /// From 0.
    month: usize,
    day: u64,
    /// From Monday.
    weekday: usize,
    /// From 1.
    day_of_year: u64,
}

impl Date {
    /// The day `days` after 1970-01-01, a Thursday.
    fn of_day(days: u64) -> Self {
        let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let (mut year, mut rest) = (1970, days);
        while rest >= 365 + u64::from(is_leap(year)) {
            rest -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let day_of_year = rest + 1;
        let mut month = 0;
        for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if rest < length {
                break;
            }
            rest -= length;
            month += 1;
        }
        Self { year, month, day: rest + 1, weekday: ((days + 3) % 7) as usize, day_of_year }
    }

    fn write(&self, out: &mut String, code: char, rest: &mut std::str::Chars<'_>) -> Option<()> {
        let month = self.month + 1;
        let _ = match code {
            'Y' => write!(out, "{:04}", self.year),
            'y' => write!(out, "{:02}", self.year % 100),
            'm' => write!(out, "{month:02}"),
            'd' => write!(out, "{:02}", self.day),
            'e' => write!(out, "{:2}", self.day),
            'j' => write!(out, "{:03}", self.day_of_year),
            'B' => write!(out, "{}", MONTHS[self.month]),
            'b' | 'h' => write!(out, "{}", &MONTHS[self.month][..3]),
            'A' => write!(out, "{}", WEEKDAYS[self.weekday]),
            'a' => write!(out, "{}", &WEEKDAYS[self.weekday][..3]),
            'F' => write!(out, "{:04}-{month:02}-{:02}", self.year, self.day),
            '%' => write!(out, "%"),
            // The C library's way to leave out the leading zero.
            '-' => match rest.next()? {
                'd' => write!(out, "{}", self.day),
                'm' => write!(out, "{month}"),
                'j' => write!(out, "{}", self.day_of_year),
                _ => return None,
            },
            _ => return None,
        };
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, format: &str) -> Option<String> {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn dates_are_written_as_c_writes_them() {
        for (seconds, format, text) in [
            (1_709_208_000, "%d %b %Y, %A %j", "29 Feb 2024, Thursday 060"),
            (1_709_208_000, "%-d/%-m/%y %B %a %F %e%%", "29/2/24 February Thu 2024-02-29 29%"),
            (1_704_110_400, "%d.%m.%Y %-j", "01.01.2024 1"),
            (1_703_937_600, "%B %d, %Y", "December 30, 2023"),
            (43_200, "%A, %Y", "Thursday, 1970"),
        ] {
            assert_eq!(at(seconds, format).as_deref(), Some(text));
        }
    }

    #[test]
    fn the_time_of_day_and_the_minute_around_midnight_are_not_written() {
        assert_eq!(at(1_709_208_000, "%H:%M"), None);
        assert_eq!(at(1_709_208_000, "%"), None);
        assert_eq!(at(1_709_164_802, "%d"), None);
        assert_eq!(at(1_709_164_797, "%d"), None);
        assert_eq!(at(1_709_164_790, "%d").as_deref(), Some("28"));
        assert_eq!(at(1_709_164_806, "%d").as_deref(), Some("29"));
    }
}
