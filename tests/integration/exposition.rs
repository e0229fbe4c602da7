use std::collections::BTreeMap;

/// The labels of a series.
pub(crate) type Labels = BTreeMap<String, String>;

/// What a node answers at `/_/metrics`, read by the letter of Prometheus' text format 0.0.4.
#[derive(Debug)]
pub(crate) struct Exposition {
    /// By name.
    pub(crate) families: BTreeMap<String, Family>,
}

/// A metric with all its series.
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) kind: String,
    pub(crate) help: String,
    /// By the name of the sample, which for a histogram has an ending, and its labels.
    samples: BTreeMap<(String, Labels), f64>,
}

impl Exposition {
    /// Reads the format strictly: each family once, under its HELP and TYPE, with each series once.
    ///
    /// # Errors
    /// The line that does not belong there, and why.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut families = BTreeMap::new();
        let mut lines = text.strip_suffix('\n').ok_or("the last line has no end")?.split('\n').peekable();
        while let Some(line) = lines.next() {
            let fail = |why: &str| Err(format!("{why}: {line}"));
            let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) else {
                return fail("no HELP where a family begins");
            };
            if !is_name(name, ":") || help.trim().is_empty() {
                return fail("a malformed HELP");
            }
            let kind = lines.next().and_then(|line| line.strip_prefix(&format!("# TYPE {name} ")));
            let Some(kind @ ("counter" | "gauge" | "histogram")) = kind else { return fail("no TYPE behind HELP") };
            let mut samples = BTreeMap::new();
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                let (sample, labels, value) = parse_sample(line).map_err(|why| format!("{why}: {line}"))?;
                let ending = sample.strip_prefix(name).ok_or_else(|| format!("a sample of another family: {line}"))?;
                let endings: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                if !endings.contains(&ending) {
                    return Err(format!("no sample of a {kind}: {line}"));
                }
                if samples.insert((sample, labels), value).is_some() {
                    return Err(format!("a series comes twice: {line}"));
                }
            }
            let family = Family { kind: kind.to_owned(), help: help.to_owned(), samples };
            family.check(name).map_err(|why| format!("{name}: {why}"))?;
            if families.insert(name.to_owned(), family).is_some() {
                return fail("a family comes twice");
            }
        }
        Ok(Self { families })
    }

    /// The sum of the samples of this name that have these labels, and perhaps others. Panics if there is none.
    #[track_caller]
    pub(crate) fn value(&self, sample: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(sample, labels).unwrap_or_else(|| panic!("there is no {sample} with {labels:?}"))
    }

    /// As [`Self::value`]; `None` if there is none.
    pub(crate) fn find(&self, sample: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let samples = self.families.values().flat_map(|family| &family.samples);
        let has = |found: &Labels| labels.iter().all(|(name, value)| found.get(*name).is_some_and(|has| has == value));
        let found = samples.filter(|((name, found), _)| name == sample && has(found)).map(|(_, value)| *value);
        found.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }

    /// Whether any series has this label.
    pub(crate) fn has_label(&self, name: &str, value: &str) -> bool {
        let mut samples = self.families.values().flat_map(|family| family.samples.keys());
        samples.any(|(_, labels)| labels.get(name).is_some_and(|found| found == value))
    }
}

impl Family {
    /// The names of the labels, without the one of the buckets.
    pub(crate) fn labels(&self) -> Vec<&str> {
        let (_, labels) = self.samples.keys().next().expect("a family has a series");
        labels.keys().map(String::as_str).filter(|name| *name != "le").collect()
    }

    fn check(&self, name: &str) -> Result<(), String> {
        if self.samples.is_empty() {
            return Err("no series".to_owned());
        }
        let labels = self.labels();
        for ((sample, own), value) in &self.samples {
            if !own.keys().map(String::as_str).filter(|name| *name != "le").eq(labels.iter().copied()) {
                return Err(format!("series with different labels: {own:?}"));
            }
            if (own.contains_key("le")) != sample.ends_with("_bucket") {
                return Err(format!("'le' is for buckets: {sample} {own:?}"));
            }
            let whole = self.kind == "counter" && !name.contains("_seconds_") || sample.ends_with("_count");
            if self.kind != "gauge" && *value < 0.0 || whole && value.fract() != 0.0 || !value.is_finite() {
                return Err(format!("{own:?} is {value}"));
            }
        }
        if self.kind == "histogram" { self.check_histogram(name) } else { Ok(()) }
    }

    /// Buckets never fall, and the last one is the count.
    fn check_histogram(&self, name: &str) -> Result<(), String> {
        let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        for ((_, labels), count) in self.samples.iter().filter(|((sample, _), _)| sample.ends_with("_bucket")) {
            let mut labels = labels.clone();
            let limit = labels.remove("le").expect("a bucket has a limit");
            let limit = if limit == "+Inf" { f64::INFINITY } else { limit.parse().map_err(|_| "a bad 'le'")? };
            buckets.entry(labels).or_default().push((limit, *count));
        }
        for (labels, mut buckets) in buckets {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            let last = buckets[buckets.len() - 1];
            let count = self.samples.get(&(format!("{name}_count"), labels.clone()));
            let sum = self.samples.get(&(format!("{name}_sum"), labels.clone()));
            if !buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1)
                || last.0 != f64::INFINITY
                || count != Some(&last.1)
                || sum.is_none()
            {
                return Err(format!("{labels:?}: {buckets:?}, count {count:?}, sum {sum:?}"));
            }
        }
        Ok(())
    }
}

fn is_name(text: &str, besides: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || besides.contains(c);
    !text.is_empty() && text.chars().all(good) && !text.starts_with(|c: char| c.is_ascii_digit())
}

/// Name, labels and value of `name{label="value",…} 1.5`.
fn parse_sample(line: &str) -> Result<(String, Labels, f64), &'static str> {
    let (series, value) = line.rsplit_once(' ').ok_or("no value")?;
    let value = value.parse().map_err(|_| "a malformed value")?;
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}').ok_or("no end of the labels")?),
        None => (series, ""),
    };
    if !is_name(name, ":") {
        return Err("a malformed name");
    }
    Ok((name.to_owned(), parse_labels(labels)?, value))
}

fn parse_labels(mut text: &str) -> Result<Labels, &'static str> {
    let mut labels = Labels::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"").ok_or("a label without a value")?;
        let end = rest.find(['"', '\\']).ok_or("a value without an end")?;
        // None of ours needs an escape.
        if rest.as_bytes()[end] == b'\\' || !is_name(name, "") || labels.contains_key(name) {
            return Err("a malformed label");
        }
        labels.insert(name.to_owned(), rest[..end].to_owned());
        text = match rest[end + 1..].strip_prefix(',') {
            Some("") => return Err("a label is missing"),
            Some(rest) => rest,
            None if rest.len() == end + 1 => "",
            None => return Err("something behind a value"),
        };
    }
    Ok(labels)
}

#[test]
fn only_what_the_format_allows_is_read() {
    let good = "# HELP a_total Counts.\n# TYPE a_total counter\na_total{x=\"1\",y=\"\"} 2\na_total{x=\"2\",y=\"\"} 3\n";
    let exposition = Exposition::parse(good).unwrap();
    assert_eq!(exposition.value("a_total", &[("x", "1")]), 2.0);
    assert_eq!(exposition.value("a_total", &[]), 5.0);
    assert_eq!(exposition.find("a_total", &[("x", "3")]), None);
    let histogram =
        "# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"0.5\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n";
    assert_eq!(Exposition::parse(histogram).unwrap().value("h_count", &[]), 2.0);
    let bad = [
        good.trim_end().to_owned(),
        good.replace("# HELP a_total Counts.\n", ""),
        good.replace("# TYPE a_total counter\n", ""),
        good.replace("counter", "number"),
        good.replace("x=\"2\"", "x=\"1\""),
        good.replace("x=\"2\"", "z=\"2\""),
        good.replace("} 2", "} two"),
        good.replace("} 2", "} -2"),
        good.replace("} 2", "} 2.5"),
        good.replace("} 2", " 2"),
        good.replace("\"1\"", "1"),
        good.replace("\"1\",", "\"1\"z,"),
        good.replace("\"\"}", "\"\",}"),
        good.replace("a_total{x=\"2\"", "b_total{x=\"2\""),
        good.replace("a_total{x=\"2\"", "a_total_sum{x=\"2\""),
        good.replace("a_total", "0_total"),
        good.replace('3', "3\n"),
        good.repeat(2),
        "# HELP a A.\n# TYPE a gauge\n".to_owned(),
        histogram.replace("} 1", "} 4"),
        histogram.replace("count 2", "count 1"),
        histogram.replace("h_sum 3\n", ""),
        histogram.replace("+Inf", "1"),
    ];
    for text in bad {
        assert!(Exposition::parse(&text).is_err(), "{text}");
    }
}
