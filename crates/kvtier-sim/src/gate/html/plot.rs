//! Plots as inline SVG: coordinates are numbers of ours, texts are escaped.

use std::fmt::Write;

use super::escaped;
use crate::gate::Estimate;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;

/// One line of a plot.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// One bar of a plot.
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) value: f64,
    pub(super) title: String,
}

/// From values to places, and the marks between.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn linear(low: f64, high: f64, from: f64, to: f64) -> Axis {
        let high = if high > low { high } else { low + 1.0 };
        let log = false;
        Axis {
            low,
            high,
            log,
            from,
            to,
        }
    }

    /// Of values above zero.
    fn log(low: f64, high: f64, from: f64, to: f64) -> Axis {
        let (low, high) = (low.max(1e-6), high.max(1e-6));
        let high = if high > low { high } else { low * 10.0 };
        let log = true;
        Axis {
            low,
            high,
            log,
            from,
            to,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn marks(&self) -> Vec<f64> {
        if self.log {
            let mut marks = Vec::new();
            let mut decade = 10f64.powf(self.low.log10().floor());
            let few = self.high / self.low < 60.0;
            while decade <= self.high && marks.len() < 40 {
                let steps: &[f64] = if few { &[1.0, 2.0, 5.0] } else { &[1.0] };
                marks.extend(steps.iter().map(|step| decade * step));
                decade *= 10.0;
            }
            // A hair of rounding must not cost the mark at the end.
            let (low, high) = (self.low * (1.0 - 1e-9), self.high * (1.0 + 1e-9));
            marks.retain(|mark| (low..=high).contains(mark));
            return marks;
        }
        let span = self.high - self.low;
        let rough = span / 5.0;
        let decade = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|factor| factor * decade)
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last.min(first + 20)).map(|mark| mark as f64 * step).collect()
    }
}

fn short(value: f64) -> String {
    let text = if value.abs() >= 10.0 || value == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_string()
    };
    if text == "-0" { "0".to_string() } else { text }
}

/// The frame of a plot: marks on the axes, what they mean, and a legend.
fn frame(x: &Axis, y: &Axis, x_marks: bool, labels: (&str, &str), legend: &[(String, usize)]) -> String {
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for mark in y.marks() {
        let place = y.place(mark);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{place:.1}\" x2=\"{:.1}\" y2=\"{place:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            place + 4.0,
            short(mark)
        );
    }
    if x_marks {
        for mark in x.marks() {
            let place = x.place(mark);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{place:.1}\" y1=\"{TOP}\" x2=\"{place:.1}\" y2=\"{:.1}\"/><text x=\"{place:.1}\" y=\"{:.1}\" \
                 text-anchor=\"middle\">{}</text>",
                HEIGHT - BOTTOM,
                HEIGHT - BOTTOM + 16.0,
                short(mark)
            );
        }
    }
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text x=\"{:.1}\" y=\"14\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0,
        escaped(labels.0),
        4.0,
        escaped(labels.1)
    );
    // From the right, the last one first: about seven units a letter.
    let mut right = WIDTH - RIGHT;
    for (name, color) in legend.iter().rev() {
        right -= name.chars().count() as f64 * 6.6 + 22.0;
        let _ = write!(
            svg,
            "<rect class=\"f{color}\" x=\"{right:.1}\" y=\"5\" width=\"10\" height=\"10\" rx=\"2\"/><text class=\"ink\" x=\"{:.1}\" y=\"14\">{}</text>",
            right + 14.0,
            escaped(name)
        );
    }
    svg
}

fn upright(low: f64, high: f64) -> Axis {
    Axis::linear(low, high, HEIGHT - BOTTOM, TOP)
}

/// Lines over an axis, logarithmic where `log_x` says so.
pub(super) fn lines(series: &[Series], x_label: &str, y_label: &str, log_x: bool) -> String {
    let all = || series.iter().flat_map(|series| &series.points);
    let low = all().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let high = all().map(|point| point.0).fold(f64::NEG_INFINITY, f64::max);
    let top = all().map(|point| point.1).fold(0.0, f64::max);
    let (low, high) = if low.is_finite() { (low, high) } else { (1.0, 10.0) };
    let to = WIDTH - RIGHT;
    let x = if log_x {
        Axis::log(low, high, LEFT, to)
    } else {
        Axis::linear(low, high, LEFT, to)
    };
    let y = upright(0.0, top);
    let legend: Vec<(String, usize)> = series
        .iter()
        .enumerate()
        .map(|(color, series)| (series.name.clone(), color))
        .collect();
    let mut svg = frame(&x, &y, true, (x_label, y_label), &legend);
    for (color, series) in series.iter().enumerate() {
        let points: Vec<String> = series
            .points
            .iter()
            .map(|point| format!("{:.1},{:.1}", x.place(point.0), y.place(point.1)))
            .collect();
        let _ = write!(
            svg,
            "<polyline class=\"line s{color}\" points=\"{}\"/>",
            points.join(" ")
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Bars side by side, above zero or below.
pub(super) fn bars(bars: &[Bar], x_label: &str, y_label: &str) -> String {
    let top = bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
    let bottom = bars.iter().map(|bar| bar.value).fold(0.0, f64::min);
    let x = Axis::linear(0.0, bars.len() as f64, LEFT, WIDTH - RIGHT);
    let y = upright(bottom, top);
    let mut svg = frame(&x, &y, false, (x_label, y_label), &[]);
    for (place, bar) in bars.iter().enumerate() {
        let (from, to) = (x.place(place as f64 + 0.15), x.place(place as f64 + 0.85));
        let (zero, end) = (y.place(0.0), y.place(bar.value));
        let _ = write!(
            svg,
            "<rect class=\"f0\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{}</title></rect><text x=\"{:.1}\" \
             y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            zero.min(end),
            to - from,
            (zero - end).abs(),
            escaped(&bar.title),
            (from + to) / 2.0,
            HEIGHT - BOTTOM + 16.0,
            escaped(&bar.label)
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Columns one after another, each a pile of kinds, and a legend of those that occur.
pub(super) fn stacked(slices: &[(f64, Vec<f64>)], kinds: &[&str], x_label: &str, y_label: &str) -> String {
    let top = slices.iter().map(|(_, counts)| counts.iter().sum()).fold(0.0, f64::max);
    let step = slices.get(1).map_or(1.0, |(from, _)| *from);
    let end = slices.last().map_or(1.0, |(from, _)| from + step);
    let x = Axis::linear(0.0, end, LEFT, WIDTH - RIGHT);
    let y = upright(0.0, top);
    let occurs = |kind: usize| slices.iter().any(|(_, counts)| counts[kind] > 0.0);
    let mut svg = frame(&x, &y, true, (x_label, y_label), &[]);
    for (from, counts) in slices {
        let (left, right) = (x.place(*from), x.place(from + step));
        let mut base = 0.0;
        for (kind, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0.0) {
            let (low, high) = (y.place(base), y.place(base + count));
            let _ = write!(
                svg,
                "<rect class=\"f{kind}\" x=\"{left:.1}\" y=\"{high:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                (right - left - 0.6).max(0.4),
                low - high
            );
            base += count;
        }
    }
    svg.push_str("</svg><p class=\"legend\">");
    for (kind, name) in kinds.iter().enumerate().filter(|(kind, _)| occurs(*kind)) {
        let _ = write!(
            svg,
            "<span><svg viewBox=\"0 0 10 10\"><rect class=\"f{kind}\" width=\"10\" height=\"10\" rx=\"2\"/></svg>{}</span> ",
            escaped(name)
        );
    }
    svg.push_str("</p>");
    svg
}

/// A point and its interval in each row, beside a bound.
pub(super) fn forest(rows: &[(String, Estimate, &'static str)], bound: f64) -> String {
    const ROW: f64 = 30.0;
    const NAMES: f64 = 150.0;
    let height = rows.len() as f64 * ROW + 40.0;
    let low = rows.iter().map(|(_, estimate, _)| estimate.low).fold(0.0, f64::min);
    let high = rows
        .iter()
        .map(|(_, estimate, _)| estimate.high)
        .fold(bound * 1.5, f64::max);
    let x = Axis::linear(low * 100.0, high * 100.0, NAMES, WIDTH - 70.0);
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\">");
    for mark in x.marks() {
        let place = x.place(mark);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{place:.1}\" y1=\"6\" x2=\"{place:.1}\" y2=\"{:.1}\"/><text x=\"{place:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{} %</text>",
            height - 28.0,
            height - 10.0,
            short(mark)
        );
    }
    let place = x.place(bound * 100.0);
    let _ = write!(
        svg,
        "<line class=\"bound\" x1=\"{place:.1}\" y1=\"6\" x2=\"{place:.1}\" y2=\"{:.1}\"/>",
        height - 28.0
    );
    for (row, (name, estimate, class)) in rows.iter().enumerate() {
        let middle = row as f64 * ROW + 22.0;
        let (from, to) = (x.place(estimate.low * 100.0), x.place(estimate.high * 100.0));
        let shown: String = name.chars().take(22).collect();
        let _ = write!(
            svg,
            "<text class=\"ink\" x=\"4\" y=\"{:.1}\">{}</text><rect class=\"{class}\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"4\" \
             rx=\"2\"/><circle class=\"{class}\" cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"6\"/><text class=\"ink\" x=\"{:.1}\" y=\"{:.1}\">{:.1} %</text>",
            middle + 4.0,
            escaped(&shown),
            middle - 2.0,
            (to - from).max(1.0),
            x.place(estimate.value * 100.0),
            WIDTH - 60.0,
            middle + 4.0,
            estimate.value * 100.0
        );
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::{Axis, short};

    #[test]
    fn marks_are_round_and_within_the_axis() {
        let marks = |axis: Axis| {
            axis.marks()
                .iter()
                .map(|mark| short(*mark))
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(marks(Axis::linear(0.0, 37.4, 0.0, 1.0)), "0 10 20 30");
        assert_eq!(marks(Axis::linear(-4.0, 10.0, 0.0, 1.0)), "0 5 10");
        assert_eq!(marks(Axis::log(0.5, 50.0, 0.0, 1.0)), "1 10");
        assert_eq!(marks(Axis::log(2.0, 50.0, 0.0, 1.0)), "2 5 10 20 50");
    }

    #[test]
    fn an_axis_of_nothing_has_room_all_the_same() {
        for axis in [Axis::linear(0.0, 0.0, 0.0, 100.0), Axis::log(0.0, 0.0, 0.0, 100.0)] {
            assert!(axis.place(0.0).is_finite() && !axis.marks().is_empty());
        }
    }
}
