//! A bar on standard error, if that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Drawing costs processor time that the nodes may need.
const DRAWS_PER_SECOND: u8 = 4;

/// Shows how far one part of the work is.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Starts at 0 of `total`, in milliseconds or in requests; `title` says of what.
    pub(crate) fn start(title: String, total: u64) -> Self {
        // It is hidden by itself where standard error is no terminal.
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
        let style = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} % {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        bar.set_prefix(title);
        Self { bar }
    }

    /// Shows how far it is, and the rate of the requests answered within `elapsed`.
    pub(crate) fn set(&self, position: u64, answered: u64, elapsed: Duration) {
        self.bar.set_position(position);
        if !elapsed.is_zero() {
            self.bar.set_message(format!("{:.0} requests/s", answered as f64 / elapsed.as_secs_f64()));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
