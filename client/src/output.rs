//! What is printed, and how: results on standard output, everything else on standard error.

use std::fmt::Write as _;

use serde::Serialize;

use crate::bus::Failure;

/// Text from elsewhere, safe for a terminal.
pub fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => printable.push(c),
            c if c.is_control() => printable.extend(c.escape_default()),
            c => printable.push(c),
        }
    }
    printable
}

/// A line, or many, on standard output, in one write. Whoever reads may stop reading, as `head` does: then it ends as other
/// programs do which SIGPIPE ends.
pub fn print(lines: &str) {
    print_bytes(lines.as_bytes());
}

/// The same of what is no text, or is for another program as it is.
pub fn print_bytes(bytes: &[u8]) {
    use std::io::{ErrorKind, Write};
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    if let Err(error) = written {
        if error.kind() == ErrorKind::BrokenPipe {
            std::process::exit(128 + rustix::process::Signal::PIPE.as_raw());
        }
        eprintln!("casemate: cannot write to standard output: {error}");
        std::process::exit(crate::FAILED.into());
    }
}

/// As `println!`, but see [`print`].
macro_rules! say {
    ($($argument:tt)*) => { $crate::output::print(&format!("{}\n", format_args!($($argument)*))) };
}
pub(crate) use say;

pub fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Local(error.to_string()))?;
    say!("{text}");
    Ok(())
}

/// Columns as wide as their widest cell.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([head[column].len()])
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let mut lines = String::new();
    for row in std::iter::once(&head).chain(&rows) {
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(lines, "{cell:width$}  ");
        }
        lines.truncate(lines.trim_end_matches(' ').len());
        lines.push('\n');
    }
    print(&lines);
}

/// Seconds since the epoch as a date, UTC.
pub fn date(seconds: u64) -> String {
    if seconds == 0 {
        return "-".into();
    }
    // Civil from days, after Howard Hinnant.
    let days = i64::try_from(seconds / 86_400).unwrap_or_default() + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", seconds / 3_600 % 24, seconds / 60 % 60)
}

pub fn size(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} B"),
        10_000..=9_999_999 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        assert_eq!(super::date(951_782_400), "2000-02-29 00:00");
        assert_eq!(super::date(1_757_153_595), "2025-09-06 10:13");
        assert_eq!(super::date(0), "-");
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(super::printable("a\x1b[31mb"), "a\\u{1b}[31mb");
    }
}
