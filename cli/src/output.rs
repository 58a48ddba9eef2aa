//! Writing to the terminal: tables for people, JSON for programs, progress on a terminal only.

use crate::Result;
use crate::error::About;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::io::{IsTerminal, Write};

/// How this run talks.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON instead of tables.
    pub json: bool,
    /// No progress bars and no summaries.
    pub quiet: bool,
}

impl Output {
    /// Writes text to standard output as it is.
    pub fn text(self, text: &str) -> Result {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).about("standard output")
    }

    /// Writes one JSON value and a newline.
    pub fn value(self, value: &Value) -> Result {
        self.text(&format!("{value:#}\n"))
    }

    /// What was done: JSON, or a line of text that a terminal gets unless `--quiet`.
    pub fn summary(self, value: &Value, line: &str) -> Result {
        if self.json {
            self.value(value)
        } else if self.quiet || !std::io::stderr().is_terminal() {
            Ok(())
        } else {
            eprintln!("{line}");
            Ok(())
        }
    }

    /// A bar over `total` bytes (`None`: unknown) on standard error if that is a terminal.
    pub fn progress(self, total: Option<u64>) -> ProgressBar {
        if self.json || self.quiet || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{msg:24!} {bar:30} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>4}",
            ),
            None => (ProgressBar::new_spinner(), "{msg:24!} {spinner} {bytes:>10} {bytes_per_sec:>12}"),
        };
        match ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }
}

/// Rows under their headings, columns aligned. Headings that begin with `>` are aligned to the right.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let titles: Vec<&str> = headings.iter().map(|heading| heading.trim_start_matches('>')).collect();
    let mut widths: Vec<usize> = titles.iter().map(|title| title.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &[&str]| {
        let mut shown = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let space = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
            if column > 0 {
                shown.push_str("  ");
            }
            if headings[column].starts_with('>') {
                shown.push_str(&space);
                shown.push_str(cell);
            } else {
                shown.push_str(cell);
                shown.push_str(&space);
            }
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    };
    if titles.iter().any(|title| !title.is_empty()) {
        line(&titles);
    }
    for row in rows {
        line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "10".to_owned()], vec!["long".to_owned(), "5".to_owned()]];
        assert_eq!(table(&["NAME", ">SIZE"], &rows), "NAME  SIZE\na       10\nlong     5\n");
        assert_eq!(table(&["", ">"], &rows), "a     10\nlong   5\n");
    }
}
