//! What is compared, and what the ratios of several rounds come to.

use std::fmt;

use serde::Serialize;

/// One figure of a row: what both sides are measured by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    /// As in `rate` or `p99`.
    pub(crate) name: &'static str,
    /// Of both sides' values, as in `/s` or `ms`.
    pub(crate) unit: &'static str,
    /// What the ratio of ours to theirs is hoped to be.
    pub(crate) goal: Option<Goal>,
}

/// What a ratio is hoped to be. It decides nothing: a slower machine is no defect.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// The median of the rounds.
    AtLeast(f64),
    /// The median of the rounds.
    AtMost(f64),
    /// The median of the rounds at most the first, and none of them above the second.
    Within(f64, f64),
}

impl Goal {
    /// Whether it is reached.
    pub(crate) fn is_met(self, ratios: Spread) -> bool {
        match self {
            Self::AtLeast(bound) => ratios.median >= bound,
            Self::AtMost(bound) => ratios.median <= bound,
            Self::Within(bound, worst) => ratios.median <= bound && ratios.max <= worst,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, ">= {bound}"),
            Self::AtMost(bound) => write!(f, "<= {bound}"),
            Self::Within(bound, worst) => write!(f, "<= {bound}, worst {worst}"),
        }
    }
}

/// The middle and the ends of several values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// None: there are no values, or one of them is no number, as the ratio to a rate of zero.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        if !values.iter().all(|value| value.is_finite()) {
            return None;
        }
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Self { median: (low + high) / 2.0, min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let spread = Spread::of([3.0, 1.0, 10.0]).unwrap();
        assert_eq!(spread, Spread { median: 3.0, min: 1.0, max: 10.0 });
        let even = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!(even, Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of([7.0]).unwrap().median, 7.0);
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([1.0, f64::INFINITY]), None);
        assert_eq!(Spread::of([f64::NAN]), None);
    }

    #[test]
    fn goals_look_at_the_median_and_the_worst() {
        let ratios = Spread { median: 1.4, min: 1.0, max: 2.6 };
        assert!(Goal::AtLeast(1.4).is_met(ratios) && !Goal::AtLeast(1.5).is_met(ratios));
        assert!(Goal::AtMost(1.4).is_met(ratios) && !Goal::AtMost(1.3).is_met(ratios));
        assert!(Goal::Within(1.5, 2.6).is_met(ratios));
        assert!(!Goal::Within(1.5, 2.5).is_met(ratios));
        assert!(!Goal::Within(1.3, 3.0).is_met(ratios));
        assert_eq!(Goal::Within(1.5, 2.5).to_string(), "<= 1.5, worst 2.5");
    }
}
