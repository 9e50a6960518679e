//! Plain text in columns as wide as their content.

use std::fmt;

/// On which side a column's cells begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows under a line of titles.
#[derive(Debug)]
pub(super) struct Columns {
    aligns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Columns {
    pub(super) fn new(titles: &[(&str, Align)]) -> Self {
        let aligns = titles.iter().map(|(_, align)| *align).collect();
        Self { aligns, rows: vec![titles.iter().map(|(title, _)| (*title).to_owned()).collect()] }
    }

    /// Adds a row with a cell for each title.
    pub(super) fn push(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.aligns.len()).map(width).collect();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).zip(&self.aligns).map(|((cell, width), align)| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            });
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut columns = Columns::new(&[("name", Align::Left), ("n", Align::Right)]);
        columns.push(vec!["endpoint".to_owned(), "12".to_owned()]);
        assert_eq!(columns.to_string(), "name       n\nendpoint  12\n");
    }
}
