//! Random numbers, and the keys they choose.

/// SplitMix64: enough for choosing keys, and a few instructions.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Equal seeds, equal numbers.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`. The bias of the multiplication is `end` in 2^64.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// From 0 to just below 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Which key the next request is for. Keys are numbers from 0.
#[derive(Clone, Debug)]
pub(crate) enum Keys {
    /// Every key equally often.
    Uniform {
        /// How many keys there are.
        count: u64,
    },
    /// Key 0 most often.
    Zipf(Zipf),
    /// Each key once: `next`, then every `step`-th after it.
    EachOnce {
        /// The next one.
        next: u64,
        /// The number of workers, each of which takes its own keys.
        step: u64,
    },
}

impl Keys {
    /// The next key.
    pub(crate) fn next(&mut self, random: &mut Random) -> u64 {
        match self {
            Self::Uniform { count } => random.below(*count),
            Self::Zipf(zipf) => zipf.next(random),
            Self::EachOnce { next, step } => {
                let key = *next;
                *next += *step;
                key
            }
        }
    }
}

/// A Zipf distribution: key `n` from 0 is as frequent as `(n + 1)` to the power of `-exponent`.
///
/// Sampled by rejection inversion (W. Hörmann and G. Derflinger, 1996): a few logarithms for each number, and no table
/// of all keys, which would push the nodes' data out of a shared cache.
#[derive(Clone, Debug)]
pub(crate) struct Zipf {
    count: f64,
    exponent: f64,
    /// The integral at both ends of the range, the first key taken whole.
    integral_first: f64,
    integral_last: f64,
    /// A candidate this near to its key is right without looking further.
    surely_within: f64,
}

impl Zipf {
    /// Over `count` keys, at least one; `exponent` is 0 (uniform) or more.
    pub(crate) fn new(count: u64, exponent: f64) -> Self {
        let mut zipf =
            Self { count: count as f64, exponent, integral_first: 0.0, integral_last: 0.0, surely_within: 0.0 };
        zipf.integral_first = zipf.integral(1.5) - 1.0;
        zipf.integral_last = zipf.integral(zipf.count + 0.5);
        zipf.surely_within = 2.0 - zipf.integral_inverse(zipf.integral(2.5) - zipf.density(2.0));
        zipf
    }

    fn next(&self, random: &mut Random) -> u64 {
        loop {
            let area = self.integral_last + random.fraction() * (self.integral_first - self.integral_last);
            let place = self.integral_inverse(area);
            let rank = place.round().clamp(1.0, self.count);
            if rank - place <= self.surely_within || area >= self.integral(rank + 0.5) - self.density(rank) {
                return rank as u64 - 1;
            }
        }
    }

    fn density(&self, x: f64) -> f64 {
        (-self.exponent * x.ln()).exp()
    }

    /// The integral of the density from 1 to `x`: `(x^(1-e) - 1) / (1-e)`, and the logarithm where `e` is 1.
    fn integral(&self, x: f64) -> f64 {
        let log = x.ln();
        let power = (1.0 - self.exponent) * log;
        log * if power.abs() > NEARLY_ZERO { power.exp_m1() / power } else { 1.0 + power / 2.0 }
    }

    fn integral_inverse(&self, area: f64) -> f64 {
        // Rounding must not take it over the pole.
        let power = (area * (1.0 - self.exponent)).max(-1.0);
        (area * if power.abs() > NEARLY_ZERO { power.ln_1p() / power } else { 1.0 - power / 2.0 }).exp()
    }
}

/// Below it the series is more exact than the quotient, which would be 0 by 0 in the end.
const NEARLY_ZERO: f64 = 1e-8;

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLES: u64 = 200_000;

    fn counts(keys: &mut Keys, count: usize) -> Vec<u64> {
        let mut random = Random::new(7);
        let mut counts = vec![0; count];
        for _ in 0..SAMPLES {
            counts[usize::try_from(keys.next(&mut random)).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn uniform_keys_are_equally_frequent() {
        for count in counts(&mut Keys::Uniform { count: 50 }, 50) {
            // Five standard deviations around 4000.
            assert!((3685..4315).contains(&count), "{count}");
        }
    }

    #[test]
    fn zipf_keys_are_as_frequent_as_the_formula_says() {
        for exponent in [0.0, 0.5, 0.99, 1.0, 1.5, 3.0] {
            let count = 1000;
            let counts = counts(&mut Keys::Zipf(Zipf::new(count, exponent)), 1000);
            let total: f64 = (1..=count).map(|n| (n as f64).powf(-exponent)).sum();
            for key in [0, 1, 2, 9, 99, 999] {
                let expected = SAMPLES as f64 * ((key + 1) as f64).powf(-exponent) / total;
                let off = (counts[key] as f64 - expected).abs();
                assert!(off <= 5.0 * expected.sqrt() + 1.0, "{exponent} {key}: {} for {expected}", counts[key]);
            }
        }
    }

    #[test]
    fn one_key_is_always_that_one() {
        assert_eq!(counts(&mut Keys::Zipf(Zipf::new(1, 0.99)), 1), [SAMPLES]);
        assert_eq!(counts(&mut Keys::Uniform { count: 1 }, 1), [SAMPLES]);
    }

    #[test]
    fn each_key_once_over_two_workers() {
        let mut random = Random::new(1);
        let mut workers = [Keys::EachOnce { next: 0, step: 2 }, Keys::EachOnce { next: 1, step: 2 }];
        let keys: Vec<_> = (0..6).map(|n| workers[n % 2].next(&mut random)).collect();
        assert_eq!(keys, [0, 1, 2, 3, 4, 5]);
    }
}
