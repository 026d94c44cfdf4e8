//! The one rendering of an error for people: what could not be done, why, the circumstances, and what to do.

use crate::error::Error;
use std::fmt;

/// A message in PostgreSQL's three parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// One line, lower case, no full stop.
    pub message: String,
    /// Sentences on the circumstances.
    pub detail: Option<String>,
    /// Sentences on what to do.
    pub hint: Option<String>,
}

impl Report {
    /// `what` could not be done, because of `error`: `could not archive WAL file "…": …`.
    pub fn new(what: &str, error: &Error) -> Self {
        Report { message: format!("{what}: {error}"), ..Report::of(error) }
    }

    /// The error by itself.
    pub fn of(error: &Error) -> Self {
        Report {
            message: error.message().to_string(),
            detail: error.detail_text().map(str::to_string),
            hint: error.hint_text().map(str::to_string),
        }
    }

    /// The same, with another sentence of detail.
    pub fn add_detail(mut self, sentence: &str) -> Self {
        self.detail = Some(match self.detail {
            Some(detail) => format!("{detail} {sentence}"),
            None => sentence.to_string(),
        });
        self
    }

    /// All of it as sentences, for a place that takes nothing else.
    pub fn sentences(&self) -> String {
        let mut first = self.message.chars();
        let capital = first.next().into_iter().flat_map(char::to_uppercase);
        let message: String = capital.chain(first).chain(['.']).collect();
        [Some(message), self.detail.clone(), self.hint.clone()].into_iter().flatten().collect::<Vec<_>>().join(" ")
    }
}

/// As psql prints a server's message.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        for (label, text) in [("DETAIL", &self.detail), ("HINT", &self.hint)] {
            if let Some(text) = text {
                write!(f, "\n{label}:  {text}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_report_has_three_parts() {
        let error = Error::new(Kind::Storage, "/srv", "store answered 403").detail("Attempt 3.").hint("Mend the key.");
        let report = Report::new("could not archive WAL file \"000000010000000000000042\"", &error)
            .add_detail("It is failure number 7.");
        assert_eq!(
            report.to_string(),
            "could not archive WAL file \"000000010000000000000042\": store answered 403\n\
             DETAIL:  Attempt 3. It is failure number 7.\n\
             HINT:  Mend the key."
        );
        assert_eq!(Report::of(&error).sentences(), "Store answered 403. Attempt 3. Mend the key.");
    }
}
