//! The page. Its data are a JSON element of it ([`Model`]); everything else is drawn from them, and every number that stands
//! in a table or is a shape's carries its place there (`data-cell`, `data-side`, `data-metric`) and its whole value. A
//! script of some lines looks whether they agree, and says so in the page's `data-checked`.

use super::{
    chart::{
        Chart, charts,
        svg::{STYLE, escape},
    },
    failures::reasons,
    model::{Cell, Model},
};
use crate::{
    experiment::{Judged, left_out_words, tally},
    metric::{Metric, number},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

const PAGE_STYLE: &str = "\
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;\
background:#fff;color:#1f2328}h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem;\
border-bottom:1px solid #d1d9e0}table{border-collapse:collapse;font-size:13px;margin:.6rem 0}\
th,td{padding:.25rem .6rem;border-bottom:1px solid #d1d9e0;text-align:left;vertical-align:top}\
tbody th[scope=row]{font-weight:400}caption{text-align:left;padding:.2rem .6rem;color:#59636e}.says{min-width:14rem}\
.wide:focus-visible,summary:focus-visible{outline:2px solid #0072b2;outline-offset:2px}\
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}\
.verdict{font-weight:600;white-space:nowrap}.reproduced{color:#1a7f37}.reversed{color:#bc4c00}.dim{color:#59636e}\
code{font-size:13px}figure{margin:1rem 0}.wide{overflow-x:auto}summary{cursor:pointer;font-weight:600;padding:.3rem 0}\
@media screen and (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}h2,th,td{border-color:#3d444d}\
.dim,caption{color:#9198a1}.reproduced{color:#3fb950}.reversed{color:#f0883e}}\
@page{size:A4 landscape;margin:10mm}\
@media screen and (max-width:760px){svg.chart{min-width:700px}.says{min-width:10rem}}\
@media print{body{max-width:none;margin:0}figure,tr{break-inside:avoid}.wide{overflow:visible}.wide table{font-size:9px}\
.wide th,.wide td{padding:1px 4px}details::details-content{content-visibility:visible}}";

const CHECK: &str = "\
const model=JSON.parse(document.getElementById('data').textContent);let wrong=0,seen=0;\
for(const e of document.querySelectorAll('[data-value]')){const d=e.dataset;seen++;\
const side=d.cell!==undefined&&model.cells.find(c=>c.name===d.cell).sides.find(s=>s.name===d.side);\
const part=d.breakdown!==undefined&&model.breakdowns[d.breakdown].breakdown.parts.find(p=>p.part===d.part);\
const there=part?part.mean_ns:d.finding!==undefined?model.findings[d.finding].ours.median:\
d.source!==undefined?side.interrupts[d.source]:side.figures[d.metric].median;\
if(there!==Number(d.value))wrong++}\
document.documentElement.dataset.checked=wrong?'wrong '+wrong:'ok '+seen;\
if(wrong)document.getElementById('wrong').hidden=false;\
addEventListener('beforeprint',()=>document.querySelectorAll('details').forEach(d=>d.open=true));";

/// The page of a report, and its charts.
///
/// # Errors
///
/// A figure that JSON has no number for.
pub fn html(model: &Model) -> Result<(String, Vec<Chart>), serde_json::Error> {
    let charts = charts(model);
    let data = serde_json::to_string(model)?;
    let heading = format!("{} · {}", model.name, model.title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>{}</title>\n<style>{PAGE_STYLE}{STYLE}</style></head>\n<body>\n<h1>{}</h1>\n",
        escape(&heading),
        escape(&heading)
    );
    if !model.source.is_empty() {
        let _ = writeln!(page, "<p class=\"dim\">{}</p>", escape(&model.source));
    }
    let _ = writeln!(
        page,
        "<p id=\"wrong\" hidden><strong>Numbers on this page differ from its data.</strong></p>\n<p>{}</p>",
        escape(&model.meaning)
    );
    surroundings(&mut page, model);
    findings(&mut page, model);
    notes(&mut page, model);
    page.push_str("<h2>Charts</h2>\n");
    for chart in charts.iter().filter(|chart| chart.cell.is_none()) {
        let _ = writeln!(
            page,
            "<figure class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"{}\">{}</figure>",
            escape(&chart.title),
            chart.svg
        );
    }
    page.push_str("<h2>Cells</h2>\n");
    for (n, cell) in model.cells.iter().enumerate() {
        let open = if n == 0 { " open" } else { "" };
        let _ = writeln!(
            page,
            "<details{open}><summary>{}</summary>",
            escape(&cell.name)
        );
        table(&mut page, cell);
        for line in &cell.equal {
            let _ = writeln!(page, "<p class=\"dim\">equal: {}</p>", escape(line));
        }
        interrupts(&mut page, cell);
        flamegraphs(&mut page, cell);
        let own = |chart: &&Chart| chart.cell.as_deref() == Some(&cell.name);
        for chart in charts.iter().filter(own) {
            let _ = writeln!(
                page,
                "<figure class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"{}\">{}</figure>",
                escape(&chart.title),
                chart.svg
            );
        }
        page.push_str("</details>\n");
    }
    // Nothing in it ends the element: `<` is always part of a string there.
    let data = data.replace('<', "\\u003c");
    let _ = write!(
        page,
        "<script type=\"application/json\" id=\"data\">{data}</script>\n<script>{CHECK}</script>\n</body></html>\n"
    );
    Ok((page, charts))
}

fn surroundings(page: &mut String, model: &Model) {
    let Some(run) = model.runs.first() else {
        return;
    };
    page.push_str("<ul class=\"dim\">\n");
    let _ = writeln!(page, "<li><code>{}</code></li>", escape(&run.command));
    let _ = writeln!(
        page,
        "<li>rounds asked for: {}, of {} s after {} s of load each{}; began on {}{}</li>",
        run.samples,
        run.duration_s,
        run.ramp_s,
        if run.quick { ", quick" } else { "" },
        date(run.seconds),
        match model.runs.len() {
            1 => String::new(),
            n => format!(", went on {} times", n - 1),
        }
    );
    for line in run.host.lines() {
        let _ = writeln!(page, "<li>{}</li>", escape(&line));
    }
    page.push_str("</ul>\n");
}

/// Seconds since 1970 as a date and time, UTC (the proleptic Gregorian calendar, counted in eras of 400 years).
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // From 1 March of the year 0, so that a leap day is the last of its year.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!(
        "{:04}-{month:02}-{day:02} {:02}:{:02} UTC",
        era * 400 + year + carry,
        rest / 3600,
        rest / 60 % 60
    )
}

fn findings(page: &mut String, model: &Model) {
    if model.findings.is_empty() {
        return;
    }
    let all = model.findings.iter().enumerate();
    let (goals, published): (Vec<_>, Vec<_>) = all.partition(|(_, judged)| judged.finding.goal);
    let (left_out, here): (Vec<_>, Vec<_>) = published
        .into_iter()
        .partition(|(_, judged)| judged.left_out);
    page.push_str("<h2>What was published, and what is found here</h2>\n");
    if !here.is_empty() {
        verdicts(page, &here, "what was published");
    }
    if !left_out.is_empty() {
        let words = left_out_words(left_out.len());
        let _ = writeln!(page, "<details><summary>{words}</summary>");
        verdicts(
            page,
            &left_out,
            "what was published and is not measured by a quick run",
        );
        page.push_str("</details>\n");
    }
    if !goals.is_empty() {
        page.push_str("<h2>What diskplane is to reach</h2>\n");
        verdicts(page, &goals, "goals of diskplane");
    }
}

/// Findings, by their numbers, in a table.
fn verdicts(page: &mut String, findings: &[(usize, &Judged)], what: &str) {
    let all: Vec<&Judged> = findings.iter().map(|(_, judged)| *judged).collect();
    let _ = writeln!(
        page,
        "<p>{}</p>\n{}<tr><th scope=\"col\">verdict</th><th scope=\"col\">finding</th>\
         <th scope=\"col\" class=\"n\">published</th><th scope=\"col\" class=\"n\">here</th><th scope=\"col\">why</th></tr>",
        escape(&tally(&all)),
        wide(&format!("verdicts: {what}"))
    );
    for (n, judged) in findings {
        let (verdict, class) = (judged.word(), judged.verdict.word(false));
        let published = judged.finding.published;
        let published = published.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2} ×"));
        let ours = match judged.ours {
            Some(figure) => format!(
                "<td class=\"n\" data-finding=\"{n}\" data-value=\"{}\">{:.2} ×</td>",
                figure.median, figure.median
            ),
            None => "<td class=\"n\">–</td>".to_owned(),
        };
        let _ = writeln!(
            page,
            "<tr><td class=\"verdict {class}\">{verdict}</td><td class=\"says\">{}</td><td class=\"n\">{published}</td>{ours}<td class=\"says\">{}</td></tr>",
            escape(&judged.finding.says),
            escape(&judged.why)
        );
    }
    page.push_str("</table></div>\n");
}

fn notes(page: &mut String, model: &Model) {
    if model.notes.is_empty() && model.failures.is_empty() && model.absent.is_empty() {
        return;
    }
    page.push_str("<h2>To be known</h2>\n<ul>\n");
    for (what, why) in &model.absent {
        let _ = writeln!(page, "<li>not here: {}: {}</li>", escape(what), escape(why));
    }
    for (why, who) in reasons(&model.failures) {
        let (who, why) = (escape(&who), escape(why));
        let _ = writeln!(page, "<li>not measured: {who}: {why}</li>");
    }
    for note in &model.notes {
        let _ = writeln!(page, "<li>{}</li>", escape(note));
    }
    page.push_str("</ul>\n");
}

/// The beginning of a table that may be wider than the page: a box that can be scrolled, by keys too, and that says what is in it.
fn wide(title: &str) -> String {
    let title = escape(title);
    format!(
        "<div class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"{title}\"><table><caption>{title}</caption>\n"
    )
}

/// All figures of a cell: median, and the standard deviation beside it.
fn table(page: &mut String, cell: &Cell) {
    let metrics: BTreeSet<Metric> = cell
        .sides
        .iter()
        .flat_map(|side| side.figures.keys().copied())
        .collect();
    // A column for each side: there are more figures than sides, and a page is higher than wide.
    let title = format!("{}: median of the rounds ± standard deviation", cell.name);
    let _ = write!(page, "{}<tr><th scope=\"col\">figure</th>", wide(&title));
    for side in &cell.sides {
        let _ = write!(
            page,
            "<th scope=\"col\" class=\"n\">{}</th>",
            escape(&side.name)
        );
    }
    page.push_str("</tr>\n");
    for metric in &metrics {
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{}</th>",
            escape(metric.title())
        );
        for side in &cell.sides {
            match side.figures.get(metric) {
                Some(drawn) => {
                    let _ = write!(
                        page,
                        "<td class=\"n\" data-cell=\"{}\" data-side=\"{}\" data-metric=\"{}\" data-value=\"{}\">{}\
                         <span class=\"dim\"> ± {}</span></td>",
                        escape(&cell.name),
                        escape(&side.name),
                        metric.name(),
                        drawn.figure.median,
                        number(*metric, drawn.figure.median),
                        number(*metric, drawn.deviation)
                    );
                }
                None => page.push_str("<td class=\"n\">–</td>"),
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("<tr><th scope=\"row\">rounds</th>");
    for side in &cell.sides {
        let rounds = side.figures.values().map(|drawn| drawn.figure.rounds);
        let _ = write!(page, "<td class=\"n\">{}</td>", rounds.max().unwrap_or(0));
    }
    page.push_str("</tr>\n</table></div>\n");
}

/// Sources of interrupts that a cell's table has at most.
const SOURCES_MAX: usize = 12;

/// Who interrupted, how often a second: the sources that did so most.
fn interrupts(page: &mut String, cell: &Cell) {
    let mut most: BTreeMap<&str, f64> = BTreeMap::new();
    for (source, n) in cell.sides.iter().flat_map(|side| &side.interrupts) {
        let own = most.entry(source).or_default();
        *own = own.max(*n);
    }
    let mut sources: Vec<(&str, f64)> = most.into_iter().filter(|(_, n)| *n >= 1.0).collect();
    if sources.is_empty() {
        return;
    }
    sources.sort_by(|a, b| b.1.total_cmp(&a.1));
    sources.truncate(SOURCES_MAX);
    let title = format!("{}: interrupts a second, by source", cell.name);
    let _ = write!(
        page,
        "{}<tr><th scope=\"col\">interrupts/s</th>",
        wide(&title)
    );
    for (source, _) in &sources {
        let _ = write!(
            page,
            "<th scope=\"col\" class=\"n\">{}</th>",
            escape(source)
        );
    }
    page.push_str("</tr>\n");
    for side in &cell.sides {
        let _ = write!(page, "<tr><th scope=\"row\">{}</th>", escape(&side.name));
        for (source, _) in &sources {
            match side.interrupts.get(*source) {
                Some(n) => {
                    let _ = write!(
                        page,
                        "<td class=\"n\" data-cell=\"{}\" data-side=\"{}\" data-source=\"{}\" data-value=\"{n}\">{}</td>",
                        escape(&cell.name),
                        escape(&side.name),
                        escape(source),
                        number(Metric::Iops, *n)
                    );
                }
                None => page.push_str("<td class=\"n\">–</td>"),
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
}

/// Where the servers of a cell spent their CPU.
fn flamegraphs(page: &mut String, cell: &Cell) {
    let drawn = cell.sides.iter().filter_map(|side| {
        let link = escape(side.flamegraph.as_deref()?);
        Some(format!("<a href=\"{link}\">{}</a>", escape(&side.name)))
    });
    let drawn: Vec<String> = drawn.collect();
    if !drawn.is_empty() {
        let _ = writeln!(page, "<p>flame graphs: {}</p>", drawn.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        load::{Latencies, Timeline},
        record::{Failure, Run, Sample, Set},
    };
    use serde_json::Value;
    use std::time::Duration;
    use trace::{
        Breakdown, Stage, Times, Totals,
        breakdown::{Part, PartTime},
    };

    /// Records of an experiment, with a name in them that would be markup.
    fn set() -> Set {
        let mut set = Set {
            runs: vec![Run {
                experiment: "E3".to_owned(),
                command: "diskplane bench run E3 </script><b>".to_owned(),
                samples: 3,
                ..Run::default()
            }],
            failures: vec![Failure {
                cell: "read-4k".to_owned(),
                side: "qemu-nbd raw".to_owned(),
                why: "<not installed>".to_owned(),
            }],
            ..Set::default()
        };
        for block in [4096_u64, 65536, 1 << 20] {
            for (side, factor) in [
                ("bare metal", 1.0),
                ("diskplane raw", 0.9),
                ("a<b>&\"c\"", 0.5),
            ] {
                for round in 0..3 {
                    let rate = factor * (1000.0 + 10.0 * round as f64) / 3.0;
                    let mut latencies = Latencies::default();
                    let mut timeline = Timeline::default();
                    for n in 0..500_u64 {
                        let latency = Duration::from_micros(50 + n * n / 100);
                        latencies.add(latency);
                        timeline.add(Duration::from_millis(n), latency);
                    }
                    set.samples.push(Sample {
                        cell: format!(
                            "read-{}",
                            ["4k", "64k", "1m"][(block.ilog2() as usize - 12) / 4]
                        ),
                        side: side.to_owned(),
                        engine: "auto".to_owned(),
                        round,
                        axes: vec![
                            ("load".to_owned(), "read".to_owned()),
                            ("block".to_owned(), block.to_string()),
                        ],
                        metrics: [
                            (Metric::Iops, rate),
                            (Metric::MbS, rate * block as f64 / 1e6),
                            (Metric::P50Us, 1e6 / rate),
                            (Metric::CpuUs, 7.0 / 3.0),
                            (Metric::CpuPercentPerMb, 0.1),
                            (Metric::OthersPercent, 99.0),
                        ]
                        .into(),
                        latency: latencies.histogram(),
                        timeline: timeline.store(),
                        stages: [(
                            "read".to_owned(),
                            Totals {
                                count: 5,
                                sum_ns: Times([5000, 0, 5000, 0, 400_000, 10_000, 0, 5000]),
                            },
                        )]
                        .into(),
                        interrupts: [
                            ("virtio0-req.0".to_owned(), 4321.0),
                            ("<b>".to_owned(), 0.5),
                        ]
                        .into(),
                        breakdown: (round == 0 && side != "bare metal")
                            .then(|| broken_down(factor)),
                        guest_interrupts: [("ata_piix".to_owned(), 1.0 / 3.0 + 7.0)].into(),
                        ..Sample::default()
                    });
                }
            }
        }
        // A cell that is no point of a curve.
        let mut more: Vec<Sample> = set.samples[..9].to_vec();
        for sample in &mut more {
            sample.cell = "disks-4".to_owned();
            sample.axes = vec![("disks".to_owned(), "4".to_owned())];
        }
        set.samples.extend(more);
        set
    }

    /// A breakdown of requests that take longer the slower a side is.
    fn broken_down(factor: f64) -> Breakdown {
        let part = |part: Part, us: f64| PartTime {
            part,
            mean_ns: us * 1000.0 / factor,
            deviation_ns: 7.0,
            share: us / 100.0,
        };
        let parts = [
            part(Part::Kick, 10.0 / 3.0),
            part(Part::In(Stage::Device), 90.0),
            part(Part::Return, 20.0 / 3.0),
        ];
        Breakdown {
            runs: 10,
            requests: 100,
            dropped: 10,
            total_ns: parts.iter().map(|time| time.mean_ns).sum(),
            parts: parts.into(),
            total_deviation_ns: 900.0,
        }
    }

    /// The attributes of every element with a value, as a browser would read them.
    fn shown(page: &str) -> Vec<[String; 4]> {
        let unescape = |text: &str| {
            let text = text.replace("&lt;", "<").replace("&gt;", ">");
            text.replace("&quot;", "\"").replace("&amp;", "&")
        };
        let attribute = |tag: &str, name: &str| {
            let start = tag.find(&format!(" data-{name}=\""))? + name.len() + 8;
            let end = tag[start..].find('"')? + start;
            Some(unescape(&tag[start..end]))
        };
        let tags = page
            .split('<')
            .map(|rest| rest.split('>').next().unwrap_or(""));
        tags.filter_map(|tag| {
            let value = attribute(tag, "value")?;
            let of = |name| attribute(tag, name).unwrap_or_default();
            let broken = attribute(tag, "breakdown").map(|n| format!("breakdown {n}"));
            let first = broken.or_else(|| attribute(tag, "finding"));
            let first = first.unwrap_or_else(|| of("cell"));
            let source = attribute(tag, "source").map(|source| format!("source {source}"));
            let metric = source.or_else(|| attribute(tag, "part"));
            Some([
                first,
                of("side"),
                metric.unwrap_or_else(|| of("metric")),
                value,
            ])
        })
        .collect()
    }

    /// A browser runs the page's own comparison of what it shows with its data, without an error.
    #[test]
    fn a_browser_shows_the_page() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.html");
        let (page, charts) = html(&Model::of(&set())).unwrap();
        std::fs::write(&path, &page).unwrap();
        let Some(seen) = testkit::chromium::look(&path) else {
            return;
        };
        let seen = seen.unwrap();
        let numbers = shown(&page[..page.find("id=\"data\">").unwrap()]).len();
        let expected = format!("\"ok {numbers}\", {} charts", page.matches("<svg ").count());
        assert!(
            seen.contains(&expected) && numbers > 100,
            "{expected}: {seen}"
        );
        assert!(!charts.is_empty());
        // One number on it that is not that of the data.
        let wrong = page.replacen("data-value=\"", "data-value=\"1", 1);
        std::fs::write(&path, wrong).unwrap();
        let wrong = testkit::chromium::look(&path).unwrap().unwrap_err();
        assert!(wrong.contains("numbers differ"), "{wrong}");
    }

    #[test]
    fn numbers_on_the_page_are_those_of_its_data() {
        let model = Model::of(&set());
        let (page, charts) = html(&model).unwrap();
        let start = page.find("id=\"data\">").unwrap() + "id=\"data\">".len();
        let end = start + page[start..].find("</script>").unwrap();
        let data: Value = serde_json::from_str(&page[start..end]).unwrap();
        assert_eq!(data["runs"][0]["command"], model.runs[0].command);
        let shown = shown(&page[..start]);
        // Three curves of a cell in three figures, CPU per MB/s, the bars of the other, tables, findings.
        assert!(shown.len() > 100, "{}", shown.len());
        for [place, side, metric, value] in &shown {
            let value: f64 = value.parse().unwrap();
            let broken = place.strip_prefix("breakdown ").map(|n| {
                let parts = &data["breakdowns"][n.parse::<usize>().unwrap()]["breakdown"]["parts"];
                let mut parts = parts.as_array().unwrap().iter();
                parts.find(|part| part["part"] == *metric).unwrap()["mean_ns"].as_f64()
            });
            if let Some(there) = broken {
                assert_eq!(there, Some(value), "{place} {metric}");
                continue;
            }
            let there = match place.parse::<usize>() {
                Ok(finding) => data["findings"][finding]["ours"]["median"].as_f64(),
                Err(_) => {
                    let named = |list: &Value, name: &str| {
                        let list = list.as_array().unwrap();
                        list.iter().find(|one| one["name"] == name).cloned()
                    };
                    let cell = named(&data["cells"], place).unwrap();
                    let side = named(&cell["sides"], side).unwrap();
                    match metric.strip_prefix("source ") {
                        Some(source) => side["interrupts"][source].as_f64(),
                        None => side["figures"][metric.as_str()]["median"].as_f64(),
                    }
                }
            };
            assert_eq!(there, Some(value), "{place} {side} {metric}");
        }
        // Interrupts by their source, where there are any to speak of.
        let of = |source: &str| {
            shown
                .iter()
                .filter(|s| s[2] == format!("source {source}"))
                .count()
        };
        assert_eq!(
            (of("virtio0-req.0"), of("guest: ata_piix"), of("<b>")),
            (12, 12, 0)
        );
        // Two sides of each of three cells (and what was taken over from two of them) have three parts each.
        let parts = shown.iter().filter(|s| s[0].starts_with("breakdown "));
        assert_eq!(parts.count(), 3 * model.breakdowns.len());
        assert_eq!(model.breakdowns.len(), 8);
        let chart = charts
            .iter()
            .find(|chart| chart.name == "breakdown")
            .unwrap();
        for words in [
            "kick: 3.70 µs",
            "device: 100.00 µs",
            "10 runs of 100, without 10 fastest",
            "read-1m",
        ] {
            assert!(chart.svg.contains(words), "{words}: {}", chart.svg);
        }
        // Every figure of every side stands in a table.
        let figures = model
            .cells
            .iter()
            .flat_map(|c| &c.sides)
            .map(|s| s.figures.len());
        assert!(shown.len() >= figures.sum());
        for name in [
            "findings",
            "over-blocks-read-mb-s",
            "bars-p50-us",
            "stages",
            "percentiles-read-4k",
        ] {
            assert!(charts.iter().any(|chart| chart.name == name), "{name}");
        }
        assert!(
            charts
                .iter()
                .any(|chart| chart.name.starts_with("heat-read-64k"))
        );
        // All stages of the trace, each with its mean.
        let stages = charts.iter().find(|chart| chart.name == "stages").unwrap();
        for stage in Stage::ALL {
            assert!(stages.svg.contains(&format!(">{stage}<")), "{stage}");
        }
        assert!(
            stages.svg.contains("device: 80.00 µs, 94.1 %"),
            "{}",
            stages.svg
        );
        assert!(stages.svg.contains("commit: 2.00 µs, 2.4 %"));
    }

    /// What a screen reader and keys need: tables with a name, whose heads say of what they are, boxes that can be scrolled
    /// without a mouse, and charts with a name.
    #[test]
    fn tables_and_charts_have_names_and_can_be_reached_by_keys() {
        let model = Model::of(&set());
        let (page, _) = html(&model).unwrap();
        let count = |text: &str| page.matches(text).count();
        assert!(count("<table>") > 3);
        assert_eq!(count("<table><caption>"), count("<table>"));
        assert_eq!((count("<th>"), count("<th class")), (0, 0));
        assert_eq!(
            count("class=\"wide\""),
            count("class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"")
        );
        assert_eq!(count("<svg "), count("role=\"img\" aria-label=\""));
        let findings: Vec<&Judged> = model.findings.iter().collect();
        assert!(page.contains(&format!("<p>{}</p>", tally(&findings))));
    }

    #[test]
    fn flame_graphs_beside_the_page_are_linked_and_nothing_else() {
        let mut set = set();
        set.samples[0].flamegraph = Some("flame/read-4k-bare-metal.svg".to_owned());
        set.samples[3].flamegraph = Some("flame/../../x.svg".to_owned());
        set.samples[6].flamegraph = Some("javascript:alert(1)".to_owned());
        let (page, _) = html(&Model::of(&set)).unwrap();
        let link = "<a href=\"flame/read-4k-bare-metal.svg\">bare metal</a>";
        assert!(page.contains(link));
        assert_eq!(page.matches("href=").count(), 1);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_795_316_404, "2026-11-22 03:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }

    #[test]
    fn nothing_on_the_page_comes_from_elsewhere_or_is_markup_by_accident() {
        let (page, _) = html(&Model::of(&set())).unwrap();
        for outside in ["src=", "href=", "@import", "url(", "<b>", "<not installed>"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(
            !page
                .replace("http://www.w3.org/2000/svg", "")
                .contains("http")
        );
        assert_eq!(page.matches("</script>").count(), 2);
        assert!(page.contains("not measured: read-4k, qemu-nbd raw: &lt;not installed&gt;"));
        assert!(page.contains("others used up to 99 %"));
        // Of no records, a page that says nothing.
        let (page, charts) = html(&Model::of(&Set::default())).unwrap();
        assert!(page.ends_with("</html>\n") && charts.is_empty());
    }
}
