//! What is shown while a migration runs. [`Progress`] is pure; [`Display`] draws it.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use migr_proto::v1::MigrationProgress;

use crate::args::Format;
use crate::failure::to_stderr;
use crate::output::json;
use crate::units::{show_bytes, show_ms};

/// Without a terminal a line is printed at least this often, by the
/// migration's own clock.
const LINE_EVERY_MS: f64 = 5000.0;

/// What has been shown so far. Reports may come late, and each round adds to
/// the total; what is shown never goes back.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Progress {
    /// Thousandths done; 1000 only when it has completed.
    pub permille: u64,
    pub bytes_sent: u64,
    pub bytes_total: u64,
    pub phase: i32,
    pub round: u32,
    pub elapsed_ms: f64,
    pub rate_bytes_per_s: u64,
    pub dirty_rate_bytes_per_s: u64,
    pub predicted_downtime_ms: f64,
}

impl Progress {
    /// Takes in a report.
    pub fn advance(&mut self, report: &MigrationProgress) {
        self.bytes_sent = self.bytes_sent.max(report.bytes_sent);
        self.bytes_total = report.bytes_total.max(self.bytes_sent);
        let whole = u128::from(self.bytes_total.max(1));
        let now = u128::from(self.bytes_sent) * 1000 / whole;
        // Everything known now may be sent and a further round still follow.
        let now = u64::try_from(now).unwrap_or(999).min(999);
        self.permille = self.permille.max(now);
        self.phase = self.phase.max(report.phase);
        self.round = self.round.max(report.round);
        if report.elapsed_ms.is_finite() {
            self.elapsed_ms = self.elapsed_ms.max(report.elapsed_ms);
        }
        self.rate_bytes_per_s = report.rate_bytes_per_s;
        self.dirty_rate_bytes_per_s = report.dirty_rate_bytes_per_s;
        self.predicted_downtime_ms = report.predicted_downtime_ms;
    }

    /// The migration completed: now it is all done.
    pub fn complete(&mut self) {
        self.permille = 1000;
    }

    fn text(&self) -> String {
        let phase = MigrationProgress { phase: self.phase, ..Default::default() };
        let phase = json::phase(phase.phase()).unwrap_or("starting");
        // What is not known yet is not told.
        if self.bytes_total == 0 {
            return phase.to_owned();
        }
        let (sent, total) = (show_bytes(self.bytes_sent), show_bytes(self.bytes_total));
        let mut text = format!("{phase}, round {}: {sent} of {total}", self.round);
        if self.rate_bytes_per_s > 0 {
            let rates = [self.rate_bytes_per_s, self.dirty_rate_bytes_per_s].map(show_bytes);
            text.push_str(&format!(", {}/s, dirtying {}/s", rates[0], rates[1]));
        }
        if self.predicted_downtime_ms > 0.0 {
            let predicted = show_ms(self.predicted_downtime_ms);
            text.push_str(&format!(", predicted downtime {predicted}"));
        }
        text
    }

    fn percent(&self) -> String {
        format!("{:>3}.{}%", self.permille / 10, self.permille % 10)
    }
}

/// Whether a plain line is due: at every change of phase or round, and from
/// time to time.
fn line_due(last: Option<&Progress>, now: &Progress) -> bool {
    last.is_none_or(|last| {
        last.phase != now.phase
            || last.round != now.round
            || now.elapsed_ms - last.elapsed_ms >= LINE_EVERY_MS
    })
}

/// Draws progress on stderr: a bar on a terminal, plain lines elsewhere, one
/// object a line for scripts.
pub struct Display {
    progress: Progress,
    style: Style,
}

enum Style {
    Objects,
    Lines { last: Option<Progress> },
    Bar(ProgressBar),
}

impl Display {
    /// For the stderr this process has.
    pub fn new(format: Format) -> Self {
        let style = match format {
            Format::Json => Style::Objects,
            Format::Human if io::stderr().is_terminal() => Style::Bar(bar()),
            Format::Human => Style::Lines { last: None },
        };
        Self { progress: Progress::default(), style }
    }

    /// Shows a report.
    pub fn show(&mut self, report: &MigrationProgress) {
        self.progress.advance(report);
        let progress = &self.progress;
        match &mut self.style {
            Style::Objects => {
                if let Ok(line) = serde_json::to_string(&json::Progress::from(report)) {
                    to_stderr(&line);
                }
            }
            Style::Lines { last } => {
                if line_due(last.as_ref(), progress) {
                    to_stderr(&format!("{} {}", progress.percent(), progress.text()));
                    *last = Some(progress.clone());
                }
            }
            Style::Bar(bar) => {
                bar.set_position(progress.permille);
                bar.set_prefix(progress.percent());
                bar.set_message(progress.text());
            }
        }
    }

    /// Runs `say`, which writes to stderr, without the bar in its way.
    pub fn aside(&self, say: impl FnOnce()) {
        match &self.style {
            Style::Bar(bar) => bar.suspend(say),
            Style::Objects | Style::Lines { .. } => say(),
        }
    }

    /// Takes the bar away; what follows is the summary.
    pub fn finish(mut self, completed: bool) {
        if completed {
            self.progress.complete();
        }
        if let Style::Bar(bar) = self.style {
            bar.set_position(self.progress.permille);
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr());
    // The template is a constant; were it wrong, the default bar would do.
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:30} {prefix} {wide_msg}") {
        bar.set_style(style);
    }
    bar.set_prefix("  0.0%");
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn report(sent: u64, total: u64) -> MigrationProgress {
        MigrationProgress { bytes_sent: sent, bytes_total: total, ..Default::default() }
    }

    #[test]
    fn a_growing_total_does_not_take_progress_back() {
        let mut progress = Progress::default();
        progress.advance(&report(90, 100));
        progress.advance(&report(91, 200));
        assert_eq!((progress.permille, progress.bytes_sent, progress.bytes_total), (900, 91, 200));
    }

    #[test]
    fn all_sent_is_not_yet_complete() {
        let mut progress = Progress::default();
        progress.advance(&report(100, 100));
        assert_eq!(progress.percent(), " 99.9%");
        progress.complete();
        assert_eq!(progress.percent(), "100.0%");
    }

    #[test]
    fn plain_lines_come_at_changes_and_from_time_to_time() {
        let start = Progress { round: 1, elapsed_ms: 10.0, ..Progress::default() };
        assert!(line_due(None, &start));
        assert!(!line_due(Some(&start), &Progress { elapsed_ms: 20.0, ..start.clone() }));
        assert!(line_due(Some(&start), &Progress { round: 2, ..start.clone() }));
        assert!(line_due(Some(&start), &Progress { phase: 4, ..start.clone() }));
        assert!(line_due(Some(&start), &Progress { elapsed_ms: 5010.0, ..start.clone() }));
    }

    fn any_report() -> impl Strategy<Value = MigrationProgress> {
        (any::<u64>(), any::<u64>(), -1..9i32, any::<u32>(), any::<f64>()).prop_map(
            |(bytes_sent, bytes_total, phase, round, elapsed_ms)| MigrationProgress {
                bytes_sent,
                bytes_total,
                phase,
                round,
                elapsed_ms,
                ..Default::default()
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_shown_never_runs_backwards(reports in prop::collection::vec(any_report(), 1..40)) {
            let mut progress = Progress::default();
            for report in reports {
                let before = progress.clone();
                progress.advance(&report);
                prop_assert!(progress.permille >= before.permille && progress.permille < 1000);
                prop_assert!(progress.bytes_sent >= before.bytes_sent);
                prop_assert!(progress.bytes_total >= progress.bytes_sent);
                prop_assert!(progress.phase >= before.phase && progress.round >= before.round);
                prop_assert!(progress.elapsed_ms >= before.elapsed_ms);
                prop_assert!(!progress.text().is_empty());
            }
        }
    }
}
