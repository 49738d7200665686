//! Tables of what happened, on standard output.

use serde_json::Value;

/// A table whose columns are as wide as what is in them.
#[derive(Clone, Debug)]
pub struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// One with only the names of its columns.
    #[must_use]
    pub fn new(title: &str, columns: &[&str]) -> Self {
        let head = columns.iter().map(|name| (*name).to_owned()).collect();
        Self { title: title.to_owned(), rows: vec![head] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: &[String]) {
        self.rows.push(cells.to_vec());
    }

    /// The whole of it.
    #[must_use]
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = format!("\n{}\n", self.title);
        for row in &self.rows {
            let cells = row.iter().zip(&widths);
            let line: String =
                cells.map(|(cell, width)| format!("{cell:<width$}  ", width = *width)).collect();
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// Prints it.
    pub fn print(&self) {
        println!("{}", self.render());
    }
}

/// A figure of a report, with one decimal.
#[must_use]
pub fn figure(report: &Value, name: &str) -> String {
    report[name].as_f64().map_or_else(|| "?".to_owned(), |value| format!("{value:.1}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let mut table = Table::new("Moves", &["move", "ms"]);
        table.row(&["1 to 2".to_owned(), "9.5".to_owned()]);
        assert_eq!(table.render(), "\nMoves\nmove    ms\n1 to 2  9.5\n");
    }
}
