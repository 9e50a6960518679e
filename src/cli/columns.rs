//! Plain text in columns as wide as their content.

use std::fmt;

/// On which side a column's cells begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows under a line of titles. A column without a value in any row is left out.
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
    pub(super) fn push(&mut self, cells: &[String]) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// Whether a column has more than its title.
    fn is_used(&self, column: usize) -> bool {
        self.rows.len() == 1 || self.rows.iter().skip(1).any(|row| !row[column].is_empty())
    }
}

/// Without what a terminal would obey: names come from clients and from other machines.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).collect()
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let used = (0..self.aligns.len()).filter(|column| self.is_used(*column));
        let used: Vec<(usize, usize)> = used.map(|column| (column, width(column))).collect();
        for row in &self.rows {
            let cells = used.iter().map(|&(column, width)| match self.aligns[column] {
                Align::Left => format!("{:<width$}", row[column]),
                Align::Right => format!("{:>width$}", row[column]),
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
        columns.push(&["endpoint".to_owned(), "12".to_owned()]);
        assert_eq!(columns.to_string(), "name       n\nendpoint  12\n");
    }

    #[test]
    fn column_without_values_is_left_out() {
        let mut columns = Columns::new(&[("a", Align::Left), ("b", Align::Left), ("c", Align::Right)]);
        columns.push(&["1".to_owned(), String::new(), "3".to_owned()]);
        columns.push(&["2".to_owned(), String::new(), String::new()]);
        assert_eq!(columns.to_string(), "a  c\n1  3\n2\n");
    }

    #[test]
    fn cells_cannot_command_the_terminal() {
        let mut columns = Columns::new(&[("name", Align::Left)]);
        columns.push(&["a\u{1b}[2J\u{9b}b\nc".to_owned()]);
        assert_eq!(columns.to_string(), "name\na[2Jbc\n");
    }
}
