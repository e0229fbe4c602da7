//! Ratios to others, measured in one run, side by side: the machine is the same, and what changes on it meanwhile
//! changes for both.
//!
//! Each row measures both sides once a round, and who begins alternates where it can. A round gives one ratio for each figure; what
//! counts is their median, and how far they spread tells what it is worth. In reading order: `figure` (ratios and
//! goals), `systems` (what runs), `kills` and `snapshots` (rows that are more than a load), `rows`.

mod figure;
mod systems;
mod kills;
mod snapshots;
mod rows;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use figure::{Figure, Spread};
use rows::{Measure, ROWS, Reading, Row, Side};
use systems::{Peers, Scale, Systems};

use crate::lab::machine::Machine;
use crate::lab::{Bench, LabCli};
use crate::options::duration;
use crate::report::Point;

/// Fewer rounds than this say little about the spread.
const ROUNDS: usize = 5;
const ROUNDS_SHORT: usize = 3;

/// More would take hours.
const ROUNDS_MAX: u64 = 100;

/// The fewer kills of a short run.
const KILLS: usize = 30;
const KILLS_SHORT: usize = 3;

/// What is many keys.
const MANY_KEYS: u64 = 1_000_000;
const MANY_KEYS_SHORT: u64 = 100_000;

const WARM_UP: Duration = Duration::from_secs(1);
const WARM_UP_SHORT: Duration = Duration::from_millis(300);

const DURATION: Duration = Duration::from_secs(5);
const DURATION_SHORT: Duration = Duration::from_secs(1);

const DD_BYTES: u64 = 512 << 20;
const DD_BYTES_SHORT: u64 = 128 << 20;

/// What was typed. The comments of the fields are the text of `--help`.
#[derive(Clone, Debug, Args)]
pub(crate) struct CompareCli {
    #[command(flatten)]
    lab: LabCli,

    /// Which rows, by name; --list names them [default: all]
    #[arg(long, value_name = "NAME,NAME,…", value_delimiter = ',')]
    rows: Vec<String>,

    /// Name the rows, and measure nothing
    #[arg(long)]
    list: bool,

    /// Fewer and shorter rounds, fewer keys and kills: a first reading, in a few minutes
    #[arg(long)]
    short: bool,

    /// How often both sides of a row are measured [default: 5, or 3 with --short]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=ROUNDS_MAX))]
    rounds: Option<u64>,

    /// How many leaders are killed [default: 30, or 3 with --short]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=ROUNDS_MAX))]
    kills: Option<u64>,

    /// How long to load before anything counts [default: 1s, or 300ms with --short]
    #[arg(long, value_name = "D", value_parser = duration)]
    warm_up: Option<Duration>,

    /// How long to measure one side of a round [default: 5s, or 1s with --short]
    #[arg(long, value_name = "D", value_parser = duration)]
    duration: Option<Duration>,

    /// How many keys are many [default: 1000000, or 100000 with --short]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=crate::options::KEYS_MAX))]
    many_keys: Option<u64>,

    /// etcd 3.4 [default: the one in PATH]
    #[arg(long, value_name = "PATH")]
    etcd: Option<PathBuf>,

    /// Go's raftexample [default: none]
    #[arg(long, value_name = "PATH")]
    go_raftexample: Option<PathBuf>,
}

/// All of it, as JSON.
#[derive(Debug, Serialize)]
struct Results {
    machine: Machine,
    version: &'static str,
    rounds: usize,
    warm_up_ms: u128,
    duration_ms: u128,
    many_keys: u64,
    rows: Vec<Outcome>,
}

/// What a row came to.
#[derive(Debug, Serialize)]
struct Outcome {
    name: &'static str,
    ours: &'static str,
    theirs: &'static str,
    /// Why it was not measured, or not to its end.
    refusal: Option<String>,
    figures: Vec<FigureOutcome>,
    rounds: Vec<Round>,
}

#[derive(Debug, Serialize)]
struct FigureOutcome {
    name: &'static str,
    unit: &'static str,
    ours: Spread,
    theirs: Spread,
    ratio: Spread,
    goal: Option<String>,
    met: Option<bool>,
}

/// One measurement of each side.
#[derive(Debug, Serialize)]
struct Round {
    ours: Vec<f64>,
    theirs: Vec<f64>,
    ours_load: Option<Point>,
    theirs_load: Option<Point>,
    notes: Vec<String>,
}

/// Does all of it, and prints as it goes. Goals that are missed are no error.
///
/// # Errors
/// One line; of rows that failed, after all others were measured.
pub(crate) fn compare(cli: &CompareCli, out: &mut dyn Write) -> Result<(), String> {
    let written = |error: io::Error| format!("failed to write the table: {error}");
    let rows = chosen(&cli.rows)?;
    if cli.list {
        return rows
            .iter()
            .try_for_each(|row| writeln!(out, "{:<16} {} / {}", row.name, row.ours, row.theirs))
            .map_err(written);
    }
    let scale = cli.scale()?;
    let peers = cli.peers()?;
    let bench = Bench::open(&cli.lab, "compare")?;
    write!(out, "{}", bench.preamble()).map_err(written)?;
    write_head(&scale, out).map_err(written)?;
    let mut results = Results {
        machine: bench.machine.clone(),
        version: env!("CARGO_PKG_VERSION"),
        rounds: scale.rounds,
        warm_up_ms: scale.warm_up.as_millis(),
        duration_ms: scale.duration.as_millis(),
        many_keys: scale.many_keys,
        rows: Vec::new(),
    };
    let mut systems = Systems::new(bench, scale, peers);
    let mut failed = Vec::new();
    for row in rows {
        let outcome = match row.systems.iter().find_map(|system| systems.refusal(*system)) {
            Some(refusal) => Outcome::refused(row, refusal.to_owned()),
            None => measure_row(row, &mut systems),
        };
        outcome.write(out).map_err(written)?;
        if outcome.refusal.is_some() && !outcome.is_left_out(&systems, row) {
            failed.push(row.name);
            // What it left may be in no state to go on with.
            systems.hold(&[])?;
        }
        results.rows.push(outcome);
        // After each row, so that an interrupted run keeps what it has.
        systems.bench.write_json(&results)?;
    }
    writeln!(out, "\nresults: {}", systems.bench.write_json(&results)?.display()).map_err(written)?;
    if failed.is_empty() { Ok(()) } else { Err(format!("failed to measure {}", failed.join(", "))) }
}

/// The rows of these names, in the order of all rows; no names are all.
fn chosen(names: &[String]) -> Result<Vec<&'static Row>, String> {
    if let Some(name) = names.iter().find(|name| !ROWS.iter().any(|row| row.name == **name)) {
        let known: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        return Err(format!("--rows '{}': there is no such row; there are {}", name.escape_debug(), known.join(", ")));
    }
    Ok(ROWS.iter().filter(|row| names.is_empty() || names.iter().any(|name| name == row.name)).collect())
}

impl CompareCli {
    fn scale(&self) -> Result<Scale, String> {
        let pick = |short, long| if self.short { short } else { long };
        let count = |given: Option<u64>, short, long| {
            given.map_or(pick(short, long), |count| usize::try_from(count).unwrap_or(usize::MAX))
        };
        let duration = self.duration.unwrap_or(if self.short { DURATION_SHORT } else { DURATION });
        if duration.is_zero() {
            return Err("--duration: write a duration of at least 1ms".to_owned());
        }
        Ok(Scale {
            rounds: count(self.rounds, ROUNDS_SHORT, ROUNDS),
            kills: count(self.kills, KILLS_SHORT, KILLS),
            warm_up: self.warm_up.unwrap_or(if self.short { WARM_UP_SHORT } else { WARM_UP }),
            duration,
            many_keys: self.many_keys.unwrap_or(if self.short { MANY_KEYS_SHORT } else { MANY_KEYS }),
            dd_bytes: if self.short { DD_BYTES_SHORT } else { DD_BYTES },
        })
    }

    fn peers(&self) -> Result<Peers, String> {
        let given = |flag: &str, path: &Option<PathBuf>| match path {
            // Where clusters run, a relative path would lead elsewhere.
            Some(path) => match path.canonicalize() {
                Ok(path) => Ok(Some(path)),
                Err(error) => Err(format!("{flag} {}: {error}", path.display())),
            },
            None => Ok(None),
        };
        let etcd = given("--etcd", &self.etcd)?.or_else(|| in_path("etcd"));
        Ok(Peers { etcd, go_raftexample: given("--go-raftexample", &self.go_raftexample)? })
    }
}

/// The program of this name that a shell would start.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

fn measure_row(row: &'static Row, systems: &mut Systems) -> Outcome {
    let mut rounds = Vec::new();
    let refusal = measure_rounds(row, systems, &mut rounds).err();
    let figures = row.figures.iter().enumerate().filter_map(|(place, figure)| figure_outcome(figure, place, &rounds));
    Outcome {
        name: row.name,
        ours: row.ours,
        theirs: row.theirs,
        figures: if refusal.is_some() { Vec::new() } else { figures.collect() },
        refusal,
        rounds,
    }
}

fn measure_rounds(row: &Row, systems: &mut Systems, rounds: &mut Vec<Round>) -> Result<(), String> {
    systems.hold(row.systems)?;
    for number in 0..row.rounds.count(&systems.scale) {
        let [ours, theirs] = match row.measure {
            Measure::Together(measure) => measure(systems)?,
            // Whoever comes second finds the disk and the caches as the first has left them.
            Measure::InTurn(measure) if number % 2 == 0 => {
                let ours = measure(systems, Side::Ours)?;
                [ours, measure(systems, Side::Theirs)?]
            }
            Measure::InTurn(measure) => {
                let theirs = measure(systems, Side::Theirs)?;
                [measure(systems, Side::Ours)?, theirs]
            }
        };
        rounds.push(Round::new(number, ours, theirs));
    }
    Ok(())
}

impl Round {
    fn new(number: usize, ours: Reading, theirs: Reading) -> Self {
        let note = |side: &str, note: String| format!("round {}, {side}: {note}", number + 1);
        let mut notes: Vec<String> = ours.notes.into_iter().map(|text| note("ours", text)).collect();
        notes.extend(theirs.notes.into_iter().map(|text| note("other", text)));
        Self { ours: ours.values, theirs: theirs.values, ours_load: ours.load, theirs_load: theirs.load, notes }
    }
}

/// What the figure in this place came to; None: it has no ratio.
fn figure_outcome(figure: &Figure, place: usize, rounds: &[Round]) -> Option<FigureOutcome> {
    let ratio = Spread::of(rounds.iter().map(|round| round.ours[place] / round.theirs[place]))?;
    Some(FigureOutcome {
        name: figure.name,
        unit: figure.unit,
        ours: Spread::of(rounds.iter().map(|round| round.ours[place]))?,
        theirs: Spread::of(rounds.iter().map(|round| round.theirs[place]))?,
        ratio,
        goal: figure.goal.map(|goal| goal.to_string()),
        met: figure.goal.map(|goal| goal.is_met(ratio)),
    })
}

fn write_head(scale: &Scale, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "{} rounds of {:?} after {:?} of warm-up, {} leaders killed; many keys are {}",
        scale.rounds, scale.duration, scale.warm_up, scale.kills, scale.many_keys
    )?;
    writeln!(out, "medians of both sides, then of the ratio, its least and its greatest value")
}

impl Outcome {
    fn refused(row: &'static Row, refusal: String) -> Self {
        let (name, ours, theirs) = (row.name, row.ours, row.theirs);
        Self { name, ours, theirs, refusal: Some(refusal), figures: Vec::new(), rounds: Vec::new() }
    }

    /// Whether it was not even tried, for want of a program.
    fn is_left_out(&self, systems: &Systems, row: &Row) -> bool {
        row.systems.iter().any(|system| systems.refusal(*system).is_some())
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "\n{}: {} / {}", self.name, self.ours, self.theirs)?;
        if let Some(refusal) = &self.refusal {
            writeln!(out, "  not measured: {refusal}")?;
        }
        for figure in &self.figures {
            figure.write(out)?;
        }
        for note in self.rounds.iter().flat_map(|round| &round.notes) {
            writeln!(out, "  {note}")?;
        }
        out.flush()
    }
}

impl FigureOutcome {
    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let value = |spread: Spread| format!("{} {}", significant(spread.median), self.unit);
        write!(
            out,
            "  {:<10} {:>13} {:>13} {:>9} ({} to {})",
            self.name,
            value(self.ours),
            value(self.theirs),
            significant(self.ratio.median),
            significant(self.ratio.min),
            significant(self.ratio.max),
        )?;
        match (&self.goal, self.met) {
            (Some(goal), Some(met)) => writeln!(out, "   goal {goal}: {}", if met { "met" } else { "missed" }),
            _ => writeln!(out),
        }
    }
}

/// A number with three digits that say something.
fn significant(value: f64) -> String {
    let decimals = match value.abs() {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        value if value >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::figure::Goal;
    use super::*;
    use crate::command_line::{CommandLine, Work};

    fn cli(arguments: &[&str]) -> CompareCli {
        let line = [&["raftexample-bench", "compare"], arguments].concat();
        match CommandLine::try_parse_from(line).unwrap().work {
            Some(Work::Compare(cli)) => cli,
            work => panic!("{work:?}"),
        }
    }

    fn round(ours: f64, theirs: f64) -> Round {
        let notes = Vec::new();
        Round { ours: vec![ours], theirs: vec![theirs], ours_load: None, theirs_load: None, notes }
    }

    #[test]
    fn ratios_are_those_of_each_round() {
        let figure = Figure { name: "rate", unit: "/s", goal: Some(Goal::AtLeast(2.0)) };
        // The ratio of the medians would be 2.0, and is not what counts.
        let rounds = [round(100.0, 100.0), round(200.0, 50.0), round(300.0, 200.0)];
        let outcome = figure_outcome(&figure, 0, &rounds).unwrap();
        assert_eq!(outcome.ratio, Spread { median: 1.5, min: 1.0, max: 4.0 });
        assert_eq!((outcome.ours.median, outcome.theirs.median, outcome.met), (200.0, 100.0, Some(false)));
        assert!(figure_outcome(&figure, 0, &[round(1.0, 0.0)]).is_none(), "nothing is no yardstick");

        let mut out = Vec::new();
        outcome.write(&mut out).unwrap();
        let line = String::from_utf8(out).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        let expected = "rate 200 /s 100 /s 1.50 (1.00 to 4.00) goal >= 2: missed";
        assert_eq!(words.join(" "), expected);
    }

    #[test]
    fn rows_have_names_of_their_own_and_keep_their_order() {
        let mut names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ROWS.len());
        let rows = chosen(&["stale-get".to_owned(), "put-1".to_owned()]).unwrap();
        assert_eq!(rows.iter().map(|row| row.name).collect::<Vec<_>>(), ["put-1", "stale-get"]);
        assert_eq!(chosen(&[]).unwrap().len(), ROWS.len());
        assert!(chosen(&["put".to_owned()]).is_err_and(|refusal| refusal.contains("put-256")));
    }

    #[test]
    fn short_runs_are_shorter_and_single_settings_win() {
        let long = cli(&[]).scale().unwrap();
        assert!((long.rounds, long.kills, long.many_keys) == (5, 30, 1_000_000), "{long:?}");
        let short = cli(&["--short", "--rounds=7"]).scale().unwrap();
        assert_eq!(short.rounds, 7);
        assert!(short.kills < long.kills && short.duration < long.duration && short.many_keys < long.many_keys);
        assert!(cli(&["--duration=0"]).scale().is_err());
    }

    #[test]
    fn numbers_keep_three_digits_that_say_something() {
        for (value, text) in [(12345.6, "12346"), (45.67, "45.7"), (1.234, "1.23"), (0.12345, "0.123"), (0.0, "0.000")]
        {
            assert_eq!(significant(value), text);
        }
    }
}
