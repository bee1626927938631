//! The report as one HTML file: no scripts, nothing fetched, every name escaped.

mod plot;

use std::fmt::Write;

use super::report::{GateReport, OptionReport};
use super::verdict::{HARMED_MAX, P99_RATIO_MAX, SAVING_MIN, Verdict};
use plot::{Bar, Series, bars, forest, lines, stacked};

const STYLE: &str = include_str!("html/style.css");

/// Text as HTML shows it: nothing in it is markup, nothing turns its direction, nothing is invisible.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' => safe.push('\n'),
            '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {
                safe.push('\u{fffd}');
            }
            letter if letter.is_control() => safe.push('\u{fffd}'),
            letter => safe.push(letter),
        }
    }
    safe
}

/// The report as people look at it.
#[must_use]
pub fn render(report: &GateReport) -> String {
    let mut page = String::new();
    page.push_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.push_str(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
    );
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    let _ = writeln!(
        page,
        "<title>{} · kvtier replay gate</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>",
        report.verdict
    );
    head(&mut page, report);
    overview(&mut page, report);
    plots(&mut page, report);
    figures(&mut page, report);
    tail(&mut page, report);
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::WorthEnabling => "yes",
        Verdict::NotWorthEnabling => "no",
        Verdict::InsufficientEvidence => "unsure",
    }
}

fn words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::WorthEnabling => "Worth enabling",
        Verdict::NotWorthEnabling => "Not worth enabling",
        Verdict::InsufficientEvidence => "Insufficient evidence",
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn milliseconds(seconds: f64) -> String {
    format!("{} ms", thousands((seconds * 1e3).round().max(0.0) as u64))
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn bytes(bytes: f64) -> String {
    let (mut value, mut unit) = (bytes, 0);
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    while value >= 1_000.0 && unit + 1 < UNITS.len() {
        value /= 1_000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn head(page: &mut String, report: &GateReport) {
    let last = report.options.last();
    let together = last.filter(|option| option.option == "together");
    let _ = writeln!(
        page,
        "<header class=\"{}\"><p class=\"kind\">kvtier replay gate</p><h1>{}</h1>",
        class(report.verdict),
        words(report.verdict)
    );
    match together {
        Some(option) => {
            let _ = writeln!(
                page,
                "<p>Together: {}; compared with {}. {}</p>",
                escaped(&option.switched_on),
                escaped(&option.compared_with),
                escaped(&sentence(&option.reasons))
            );
        }
        None => {
            let _ = writeln!(page, "<p>None of the options below passed by itself.</p>");
        }
    }
    let facts = [
        ("requests", thousands(report.requests as u64)),
        ("sessions", thousands(report.sessions as u64)),
        ("prompt tokens", thousands(report.prompt_tokens)),
        (
            "time of the trace",
            format!("{} s", thousands(report.duration_s as u64)),
        ),
        ("model", escaped(&report.profile)),
        ("hardware", escaped(&report.hardware.name)),
        (
            "GPUs",
            match report.hardware.gpu_servers {
                0 => "always an idle one".to_string(),
                servers => format!("{servers} groups, queued for"),
            },
        ),
        ("compared with", escaped(&report.baseline)),
    ];
    page.push_str("<dl>");
    for (name, value) in facts {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    page.push_str("</dl></header>\n");
}

fn sentence(reasons: &[String]) -> String {
    let mut text = reasons.join("; ");
    if let Some(first) = text.get(..1).map(str::to_uppercase) {
        text.replace_range(..1, &first);
    }
    text.push('.');
    text
}

fn overview(page: &mut String, report: &GateReport) {
    page.push_str("<section><h2>What each option saves</h2>\n");
    let rows: Vec<(String, _, _)> = report
        .options
        .iter()
        .map(|option| {
            (
                option.option.clone(),
                option.comparison.ttft_saving,
                class(option.verdict),
            )
        })
        .collect();
    page.push_str("<figure>");
    page.push_str(&forest(&rows, SAVING_MIN));
    page.push_str(
        "<figcaption>Share of the time to first tokens that is saved, with its 95 % interval over blocks of sessions. The dashed \
         line is what must be saved at least.</figcaption></figure>\n<div class=\"scroll\"><table class=\"stack\"><thead><tr><th>option</th>\
         <th>verdict</th><th>prefill saved</th><th>time to first token saved</th><th>p50</th><th>p95</th><th>p99</th>\
         <th>p99 ratio</th><th>harmed</th></tr></thead><tbody>\n",
    );
    for option in &report.options {
        let compared = &option.comparison;
        let interval = |estimate: &super::Estimate| {
            format!(
                "{} <small>{} to {}</small>",
                percent(estimate.value),
                percent(estimate.low),
                percent(estimate.high)
            )
        };
        let moved =
            |before: f64, after: f64| format!("<small>{} →</small> {}", milliseconds(before), milliseconds(after));
        let _ = writeln!(
            page,
            "<tr><th>{}<small>{}, against {}</small></th><td><span class=\"chip {}\">{}</span></td><td>{}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{:.3}</td><td>{}</td></tr>",
            escaped(&option.option),
            escaped(&option.switched_on),
            escaped(&option.compared_with),
            class(option.verdict),
            option.verdict,
            interval(&compared.prefill_saving),
            interval(&compared.ttft_saving),
            moved(option.ttft_before.p50_s, option.ttft_after.p50_s),
            moved(option.ttft_before.p95_s, option.ttft_after.p95_s),
            moved(option.ttft_before.p99_s, option.ttft_after.p99_s),
            compared.ttft_p99_ratio.value,
            percent(compared.harmed.value)
        );
    }
    page.push_str("</tbody></table></div>\n<ul>\n");
    for option in &report.options {
        let _ = writeln!(
            page,
            "<li><b>{}</b> {}</li>",
            escaped(&option.option),
            escaped(&sentence(&option.reasons))
        );
    }
    let _ = writeln!(
        page,
        "</ul>\n<p class=\"note\">Worth enabling: both savings at least {} at the lower bound, the 99th percentile at most {P99_RATIO_MAX} times \
         what it was, and at most {} of the requests harmed (longer than 1.05 times and 2 ms more).</p></section>",
        percent(SAVING_MIN),
        percent(HARMED_MAX)
    );
}

fn plots(page: &mut String, report: &GateReport) {
    page.push_str("<section><h2>Hits by size of the cache</h2>\n<figure>");
    let series: Vec<Series> = ["opt", "hazard", "lru"]
        .into_iter()
        .map(|policy| Series {
            name: match policy {
                "opt" => "the future known (OPT)",
                "hazard" => "reuse hazards",
                _ => "least recently used",
            }
            .to_string(),
            points: report
                .hit_ratio_by_capacity
                .iter()
                .filter(|row| row.policy == policy)
                .map(|row| (row.capacity * 100.0, row.prefix_hit_token_ratio * 100.0))
                .collect(),
        })
        .collect();
    page.push_str(&lines(
        &series,
        "size, % of the distinct blocks",
        "prompt tokens hit, %",
        true,
    ));
    page.push_str("<figcaption>One cache by itself, without time. No policy can be above the first line.</figcaption></figure></section>\n");
    for option in &report.options {
        let name = escaped(&option.option);
        let _ = writeln!(page, "<section><h2>{name}</h2><div class=\"pair\"><figure>");
        page.push_str(&curve(option));
        page.push_str(
            "<figcaption>Share of the requests whose first token is there by then.</figcaption></figure>\n<figure>",
        );
        let turns: Vec<Bar> = option
            .saving_by_turn
            .iter()
            .map(|turn| Bar {
                label: turn.turn.to_string(),
                value: turn.ttft_saving * 100.0,
                title: format!("turn {}: {} requests", turn.turn, thousands(turn.requests)),
            })
            .collect();
        page.push_str(&bars(
            &turns,
            "turn of the session (the last: and later)",
            "time to first tokens saved, %",
        ));
        page.push_str("<figcaption>What the turns of sessions save.</figcaption></figure></div>\n<figure>");
        let kinds: Vec<&str> = report.decisions.iter().map(|kind| kind.words()).collect();
        let slices: Vec<(f64, Vec<f64>)> = option
            .decisions_over_time
            .iter()
            .map(|slice| (slice.from_s, slice.requests.iter().map(|count| *count as f64).collect()))
            .collect();
        page.push_str(&stacked(&slices, &kinds, "time, s", "requests"));
        page.push_str("<figcaption>What was done for the requests of each sixtieth of the trace.</figcaption></figure></section>\n");
    }
}

/// Both distributions of the time to the first token.
fn curve(option: &OptionReport) -> String {
    let points = |of: fn(&(f64, f64, f64)) -> f64| {
        let drawn = option.ttft_curve.iter().filter(|point| of(point) > 0.0);
        drawn.map(|point| (of(point) * 1e3, point.0 * 100.0)).collect()
    };
    let series = [
        Series {
            name: "before".to_string(),
            points: points(|point| point.1),
        },
        Series {
            name: "with it".to_string(),
            points: points(|point| point.2),
        },
    ];
    lines(&series, "time to the first token, ms", "requests, %", true)
}

fn figures(page: &mut String, report: &GateReport) {
    page.push_str(
        "<section><h2>Where tokens came from, and what moved</h2>\n<div class=\"scroll\"><table><thead><tr><th>option</th>\
         <th>hits by tier</th><th>by link</th><th>NVMe writes a day</th><th>prefill saved</th><th>cost a day</th><th>gates</th></tr></thead><tbody>\n",
    );
    for option in &report.options {
        let hits: Vec<String> = option
            .hit_ratio_by_tier
            .iter()
            .filter(|hit| hit.ratio > 0.0)
            .map(|hit| format!("{} {}", escaped(&hit.tier), percent(hit.ratio)))
            .collect();
        let links: Vec<String> = option
            .links
            .iter()
            .map(|link| {
                format!(
                    "{} {} <small>busy {}</small>",
                    escaped(&link.link),
                    bytes(link.bytes as f64),
                    percent(link.busy)
                )
            })
            .collect();
        let written = option.nvme_drive_writes_per_day.map_or_else(String::new, |drives| {
            format!(
                "{} <small>{drives:.1} capacities</small>",
                bytes(option.nvme_written_bytes_per_day)
            )
        });
        let cost = option.cost_per_day.as_ref().map_or_else(String::new, |cost| {
            format!(
                "<small>{:.0} →</small> {:.0} {}",
                cost.before,
                cost.after,
                escaped(&cost.currency)
            )
        });
        let gates: Vec<String> = option
            .gates
            .iter()
            .map(|gate| {
                let state = if gate.open { "open" } else { "closed" };
                format!(
                    "{} {state} <small>{}; turned {} times, {} of probes</small>",
                    escaped(&gate.remote),
                    escaped(&gate.reason),
                    gate.flips,
                    bytes(gate.probe_bytes as f64)
                )
            })
            .collect();
        let _ = writeln!(
            page,
            "<tr><th>{}</th><td>{}</td><td>{}</td><td>{written}</td><td>{:.0} s</td><td>{cost}</td><td>{}</td></tr>",
            escaped(&option.option),
            hits.join("<br>"),
            links.join("<br>"),
            option.prefill_seconds_saved,
            gates.join("<br>")
        );
    }
    page.push_str("</tbody></table></div></section>\n");
}

fn tail(page: &mut String, report: &GateReport) {
    if !report.settings.is_empty() {
        let _ = writeln!(
            page,
            "<section><h2>Settings that switch it on</h2><pre>{}</pre></section>",
            escaped(&report.settings)
        );
    }
    page.push_str("<section><h2>Made of</h2>\n<div class=\"scroll\"><table><tbody>\n");
    for input in &report.inputs {
        let _ = writeln!(
            page,
            "<tr><th>{}</th><td>{}</td><td><code>{}</code></td></tr>",
            escaped(&input.what),
            escaped(&input.name),
            escaped(&input.sha256)
        );
    }
    let hardware = &report.hardware;
    let mut parts = vec![format!(
        "host {} GiB at {} GB/s",
        hardware.host.gib, hardware.host.gb_per_s
    )];
    if let Some(nvme) = &hardware.nvme {
        parts.push(format!(
            "NVMe {} GiB, reads {} GB/s, writes {} GB/s",
            nvme.gib, nvme.read_gb_per_s, nvme.write_gb_per_s
        ));
    }
    for remote in &hardware.remote {
        parts.push(format!(
            "{} {} GB/s after {} ms, {} of fetches fail",
            remote.name,
            remote.gb_per_s,
            remote.latency_ms,
            percent(remote.failure_probability)
        ));
    }
    let _ = writeln!(
        page,
        "</tbody></table></div>\n<p class=\"note\">{}. Blocks of {} tokens, {}. Lines skipped: {}. Seed {}, {} resamples. No byte moved: the tier \
         manager and the cost model decided, devices, links and GPUs were simulated. Sessions are told from shared prefixes.</p></section>",
        escaped(&parts.join("; ")),
        report.block_tokens,
        bytes(report.block_bytes as f64),
        report.skipped_lines,
        report.seed,
        report.resamples
    );
}

#[cfg(test)]
mod tests {
    use super::{bytes, escaped, thousands};

    #[test]
    fn nothing_in_a_text_is_markup_or_turns_its_direction() {
        assert_eq!(escaped("<script>'\"&"), "&lt;script&gt;&#39;&quot;&amp;");
        assert_eq!(escaped("a\u{202e}b\u{0}c\u{200b}"), "a\u{fffd}b\u{fffd}c\u{fffd}");
        assert_eq!(escaped("Grüße, 世界"), "Grüße, 世界");
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(bytes(1_500_000.0), "1.5 MB");
    }
}
