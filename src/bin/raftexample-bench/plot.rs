//! Throughput against latency, as SVG: one point for each measurement.

use std::path::Path;

use plotters::prelude::*;

use crate::report::{Latency, Point, Report};

const SIZE: (u32, u32) = (900, 600);

/// Room above and below the points, as a factor of the latency.
const LATENCY_MARGIN: f64 = 1.5;

/// Room right of the points, as a factor of the rate.
const RATE_MARGIN: f64 = 1.1;

/// Takes one figure, in microseconds, out of several.
type Quantile = fn(&Latency) -> f64;

/// What is drawn, how it is called, and in which color: told apart also by those who see no red or no green.
const LINES: [(&str, Quantile, RGBColor); 3] = [
    ("p50", |latency| latency.p50_us, RGBColor(0, 114, 178)),
    ("p99", |latency| latency.p99_us, RGBColor(230, 159, 0)),
    ("p99.9", |latency| latency.p999_us, RGBColor(204, 121, 167)),
];

/// Draws `report` into `path`. Points without a success have no place on it.
///
/// # Errors
/// One line.
pub(crate) fn draw(report: &Report, path: &Path) -> Result<(), String> {
    let points: Vec<_> = report.points.iter().filter(|point| point.latency.count > 0).collect();
    if points.is_empty() {
        return Err(format!("failed to draw {}: no request succeeded", path.display()));
    }
    draw_points(report, &points, path).map_err(|error| format!("failed to draw {}: {error}", path.display()))
}

fn draw_points(report: &Report, points: &[&Point], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let rate_end = points.iter().map(|point| point.requests_per_second).fold(1.0, f64::max) * RATE_MARGIN;
    let latencies = || points.iter().flat_map(|point| LINES.map(|(_, of, _)| of(&point.latency) / 1e3));
    let lowest = latencies().fold(f64::MAX, f64::min).max(1e-3) / LATENCY_MARGIN;
    let highest = latencies().fold(lowest, f64::max) * LATENCY_MARGIN;

    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let title =
        format!("{} on {} ({}), values of {} bytes", report.operation, report.target, report.api, report.value_bytes);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(45)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..rate_end, (lowest..highest).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("requests per second")
        .y_desc("latency in ms")
        .x_label_formatter(&|rate| format!("{rate:.0}"))
        .y_label_formatter(&|millis| format!("{millis:.3}").trim_end_matches('0').trim_end_matches('.').to_owned())
        .draw()?;
    for (name, of, color) in LINES {
        let places: Vec<_> =
            points.iter().map(|point| (point.requests_per_second, of(&point.latency).max(1.0) / 1e3)).collect();
        let line = chart.draw_series(LineSeries::new(places.iter().copied(), color.stroke_width(2)))?;
        line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart.draw_series(places.iter().map(|place| Circle::new(*place, 4, color.filled())))?;
    }
    // Below all lines: the p50 is the lowest of them.
    chart.draw_series(points.iter().map(|point| {
        let place = (point.requests_per_second, point.latency.p50_us.max(1.0) / 1e3);
        EmptyElement::at(place) + Text::new(point_name(point), (-12, 10), ("sans-serif", 12))
    }))?;
    chart.configure_series_labels().position(SeriesLabelPosition::UpperLeft).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}

fn point_name(point: &Point) -> String {
    let rate = point.offered_per_second.map_or_else(String::new, |rate| format!("{rate}/s "));
    format!("{rate}c={}", point.connections)
}
