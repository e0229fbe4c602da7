//! Clients' requests, by method, status and consistency.

use std::sync::OnceLock;
use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};
use tiny_http::Method;

use super::{Families, REQUEST_SECONDS};

/// The label of every method that the API has; all others are `other`, and so is a request that is none.
const METHODS: [&str; 7] = ["GET", "HEAD", "PUT", "DELETE", "POST", "OPTIONS", "other"];

/// The statuses that the API and its server answer with.
const STATUSES: [u16; 21] =
    [200, 204, 304, 400, 404, 405, 408, 409, 410, 412, 413, 414, 417, 422, 431, 500, 501, 503, 504, 505, 507];

/// The labels of [`STATUSES`], and of whatever else a later version may answer.
const STATUS_LABELS: [&str; STATUSES.len() + 1] = [
    "200", "204", "304", "400", "404", "405", "408", "409", "410", "412", "413", "414", "417", "422", "431", "500",
    "501", "503", "504", "505", "507", "other",
];

/// How fresh the state is that a request has to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// It sees every write that was answered before it began.
    Linearizable,
    /// It sees this node's own state, whatever that is.
    Stale,
    /// It is no read of the replicated state, or was refused before that was known.
    None,
}

/// The labels of [`Consistency`].
const CONSISTENCIES: [&str; 3] = ["linearizable", "stale", "none"];

/// What is counted of clients' requests.
///
/// A series is made when its first request is answered. Until then its place in the table is empty, so that the usual
/// request finds its counters by their position, and no labels are compared or copied.
pub struct Requests {
    totals: IntCounterVec,
    durations: HistogramVec,
    total: Vec<OnceLock<IntCounter>>,
    duration: Vec<OnceLock<Histogram>>,
}

impl Requests {
    pub(super) fn new(family: &Families) -> Requests {
        let totals = family.counters(
            "raftexample_http_requests_total",
            "Requests of clients that were answered.",
            &["method", "status", "consistency"],
        );
        let durations = family.histograms(
            "raftexample_http_request_duration_seconds",
            "Time from the arrival of a request to its answer; without requests that wait for a change.",
            &["method", "consistency"],
            REQUEST_SECONDS,
        );
        let table = METHODS.len() * CONSISTENCIES.len();
        let requests = Requests {
            totals,
            durations,
            total: std::iter::repeat_with(OnceLock::new).take(table * STATUS_LABELS.len()).collect(),
            duration: std::iter::repeat_with(OnceLock::new).take(table).collect(),
        };
        // What a dashboard asks for from the first moment on.
        for (method, status, consistency) in
            [("PUT", "204", "none"), ("GET", "200", "linearizable"), ("GET", "200", "stale")]
        {
            requests.totals.with_label_values(&[method, status, consistency]);
            requests.durations.with_label_values(&[method, consistency]);
        }
        requests
    }

    /// A request was answered. `method` is `None` if nobody could read it, `took` if waiting was what it asked for.
    pub fn answered(&self, method: Option<&Method>, status: u16, consistency: Consistency, took: Option<Duration>) {
        let method = method_place(method);
        let status = STATUSES.iter().position(|known| *known == status).unwrap_or(STATUSES.len());
        let place = method * CONSISTENCIES.len() + consistency as usize;
        let labels = || (METHODS[method], CONSISTENCIES[consistency as usize]);
        let total = self.total[place * STATUS_LABELS.len() + status].get_or_init(|| {
            let (method, consistency) = labels();
            self.totals.with_label_values(&[method, STATUS_LABELS[status], consistency])
        });
        total.inc();
        if let Some(took) = took {
            let duration = self.duration[place].get_or_init(|| {
                let (method, consistency) = labels();
                self.durations.with_label_values(&[method, consistency])
            });
            duration.observe(took.as_secs_f64());
        }
    }
}

/// Where a method stands in [`METHODS`].
fn method_place(method: Option<&Method>) -> usize {
    match method {
        Some(Method::Get) => 0,
        Some(Method::Head) => 1,
        Some(Method::Put) => 2,
        Some(Method::Delete) => 3,
        Some(Method::Post) => 4,
        Some(Method::Options) => 5,
        _ => METHODS.len() - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn each_request_is_counted_under_its_labels_and_unknown_ones_share_theirs() {
        let metrics = Metrics::new();
        let strange = "BREW".parse().expect("a method");
        let took = Some(Duration::from_millis(3));
        for _ in 0..2 {
            metrics.requests.answered(Some(&Method::Put), 204, Consistency::None, took);
        }
        metrics.requests.answered(Some(&Method::Get), 200, Consistency::Stale, None);
        metrics.requests.answered(Some(&strange), 405, Consistency::None, took);
        metrics.requests.answered(None, 299, Consistency::None, None);
        let text = metrics.text();
        for line in [
            r#"raftexample_http_requests_total{consistency="none",method="PUT",status="204"} 2"#,
            r#"raftexample_http_requests_total{consistency="stale",method="GET",status="200"} 1"#,
            r#"raftexample_http_requests_total{consistency="none",method="other",status="405"} 1"#,
            r#"raftexample_http_requests_total{consistency="none",method="other",status="other"} 1"#,
            r#"raftexample_http_request_duration_seconds_bucket{consistency="none",method="PUT",le="0.0025"} 0"#,
            r#"raftexample_http_request_duration_seconds_bucket{consistency="none",method="PUT",le="0.005"} 2"#,
            r#"raftexample_http_request_duration_seconds_count{consistency="stale",method="GET"} 0"#,
            r#"raftexample_http_request_duration_seconds_count{consistency="none",method="other"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
        }
    }

    #[test]
    fn the_labels_of_statuses_are_the_statuses() {
        let labels = STATUSES.map(|status| status.to_string());
        assert_eq!(labels[..], STATUS_LABELS[..STATUSES.len()]);
        assert!(STATUSES.is_sorted());
    }
}
