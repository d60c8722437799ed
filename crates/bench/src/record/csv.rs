//! Samples as a table (RFC 4180): a line each, a column for each thing that any of them has. Histograms, latencies over time and whole reports
//! are in the records alone.
//!
//! ```text
//!   cell side engine round in-turns seconds seed     which sample
//!   load block …                                     the cell's factors
//!   o-direct queues servers flushes-asked flushes-reached command   how the server was started, and is seen to be
//!   iops cpu-us p50-us …                             every figure, by its name in the records
//!   stage-read-device-us …                           mean time of a stage of diskplane, by operation
//!   breakdown-device-us …                            the same of single requests, by the protocol of the latency study
//!   experiment run-seconds quick duration-s … kernel file-system device cpu diskplane …      the run's surroundings
//! ```

use super::{Run, Sample, Set};
use crate::metric::Metric;
use std::{collections::BTreeSet, fmt::Write};
use trace::Stage;

/// The table of a run's samples, with a head. What a sample lacks is empty.
pub fn csv(set: &Set) -> String {
    let mut table = Table {
        samples: &set.samples,
        columns: Vec::new(),
    };
    table.which();
    table.factors();
    table.server();
    table.figures();
    table.stages();
    if let Some(run) = set.runs.first() {
        table.surroundings(run);
    }
    table.text()
}

/// A table, column by column.
struct Table<'a> {
    samples: &'a [Sample],
    columns: Vec<(String, Vec<String>)>,
}

/// A number, or nothing.
fn number<N: ToString>(value: Option<N>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

impl Table<'_> {
    fn add(&mut self, name: impl Into<String>, value: impl Fn(&Sample) -> String) {
        let values = self.samples.iter().map(value).collect();
        self.columns.push((name.into(), values));
    }

    /// The same of all samples.
    fn constant(&mut self, name: &str, value: &dyn ToString) {
        let value = value.to_string();
        self.add(name, |_| value.clone());
    }

    fn which(&mut self) {
        self.add("cell", |s| s.cell.clone());
        self.add("side", |s| s.side.clone());
        self.add("engine", |s| s.engine.clone());
        self.add("round", |s| s.round.to_string());
        self.add("in-turns", |s| s.in_turns.to_string());
        self.add("seconds", |s| s.seconds.to_string());
        self.add("seed", |s| s.seed.to_string());
    }

    fn factors(&mut self) {
        let mut axes: Vec<&str> = Vec::new();
        for (name, _) in self.samples.iter().flat_map(|s| &s.axes) {
            if !axes.contains(&name.as_str()) {
                axes.push(name);
            }
        }
        for axis in axes {
            self.add(axis, |s| {
                let own = s.axes.iter().find(|(name, _)| name == axis);
                own.map_or_else(String::new, |(_, value)| value.clone())
            });
        }
    }

    fn server(&mut self) {
        self.add("o-direct", |s| number(s.seen.as_ref().map(|s| s.direct)));
        self.add("queues", |s| number(s.seen.as_ref().map(|s| s.queues)));
        self.add("servers", |s| number(s.seen.as_ref().map(|s| s.servers)));
        let flushes = |s: &Sample| s.seen.as_ref()?.flushes;
        self.add("flushes-asked", |s| number(flushes(s).map(|f| f.asked)));
        self.add("flushes-reached", |s| number(flushes(s).map(|f| f.reached)));
        self.add("command", |s| {
            let words = s.detail["command"].as_array().into_iter().flatten();
            let words: Vec<&str> = words.filter_map(|word| word.as_str()).collect();
            words.join(" ")
        });
    }

    fn figures(&mut self) {
        let all = self.samples.iter().flat_map(|s| s.metrics.keys().copied());
        for metric in all.collect::<BTreeSet<Metric>>() {
            self.add(metric.name(), |s| number(s.metric(metric)));
        }
    }

    fn stages(&mut self) {
        let operations = self.samples.iter().flat_map(|s| s.stages.keys());
        for operation in operations.collect::<BTreeSet<_>>() {
            for stage in Stage::ALL {
                self.add(format!("stage-{operation}-{}-us", stage.name()), |s| {
                    let own = s.stages.get(operation).filter(|totals| totals.count > 0);
                    number(own.map(|totals| totals.mean_us(stage)))
                });
            }
        }
        let mut parts = Vec::new();
        for time in self
            .samples
            .iter()
            .flat_map(|s| &s.breakdown)
            .flat_map(|b| &b.parts)
        {
            if !parts.contains(&time.part) {
                parts.push(time.part);
            }
        }
        for part in parts {
            self.add(format!("breakdown-{}-us", part.name()), |s| {
                let mut own = s.breakdown.iter().flat_map(|b| &b.parts);
                let own = own.find(|time| time.part == part);
                number(own.map(|time| time.mean_ns / 1000.0))
            });
        }
    }

    /// A run that went on has the same as the first: else it would have been refused.
    fn surroundings(&mut self, run: &Run) {
        let host = &run.host;
        let none = String::new();
        let version = |version: &Option<String>| version.clone().unwrap_or_else(|| none.clone());
        let columns: [(&str, &dyn ToString); 21] = [
            ("experiment", &run.experiment),
            ("run-seconds", &run.seconds),
            ("run-command", &run.command),
            ("quick", &run.quick),
            ("samples", &run.samples),
            ("ramp-s", &run.ramp_s),
            ("duration-s", &run.duration_s),
            ("sizes", &run.sizes),
            ("kernel", &host.kernel),
            ("cpu", &host.cpu),
            ("cores", &host.cores),
            ("memory-mib-host", &host.memory_mib),
            ("file-system", &host.file_system),
            ("device", &host.device),
            ("diskplane", &host.diskplane),
            ("qemu-storage-daemon", &version(&host.qemu_storage_daemon)),
            ("qemu-nbd", &version(&host.qemu_nbd)),
            ("fio", &version(&host.fio)),
            ("spdk", &version(&host.spdk)),
            ("nbdkit", &version(&host.nbdkit)),
            ("tapdisk", &version(&host.tapdisk)),
        ];
        for (name, value) in columns {
            self.constant(name, value);
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let line = |cells: &mut dyn Iterator<Item = &str>, text: &mut String| {
            for (n, cell) in cells.enumerate() {
                let comma = if n == 0 { "" } else { "," };
                let _ = write!(text, "{comma}{}", field(cell));
            }
            text.push_str("\r\n");
        };
        line(
            &mut self.columns.iter().map(|(name, _)| name.as_str()),
            &mut text,
        );
        for n in 0..self.samples.len() {
            line(
                &mut self.columns.iter().map(|(_, values)| values[n].as_str()),
                &mut text,
            );
        }
        text
    }
}

/// In quotes where it has to be.
fn field(text: &str) -> String {
    match text.contains(['"', ',', '\r', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{equal::Flushed, machine::Host, peer::Seen};
    use trace::{
        Breakdown, Times, Totals,
        breakdown::{Part, PartTime},
    };

    #[test]
    fn numbers_are_those_of_the_records() {
        // Of which a quick reader gets the last digit wrong.
        for text in [
            "14769.230769230768",
            "1.7976931348623157",
            "0.30000000000000004",
            "8.255e-4",
        ] {
            let json = format!("{{\"metrics\":{{\"iops\":{text}}}}}");
            let sample: Sample = serde_json::from_str(&json).unwrap();
            let set = Set {
                samples: vec![sample.clone()],
                ..Set::default()
            };
            let shown = &column(&csv(&set), "iops")[0];
            assert_eq!(shown.parse::<f64>(), text.parse::<f64>());
            assert!(
                serde_json::to_string(&sample)
                    .unwrap()
                    .contains(&format!("\"iops\":{text}"))
                    || text.contains('e')
            );
        }
    }

    #[test]
    fn every_figure_has_its_column() {
        let one = Sample {
            cell: "a,\"b\"".to_owned(),
            side: "x".to_owned(),
            engine: "auto".to_owned(),
            axes: vec![("block".to_owned(), "4 KiB".to_owned())],
            metrics: [(Metric::Iops, 1.5)].into(),
            ..Sample::default()
        };
        let two = Sample {
            axes: Vec::new(),
            metrics: [(Metric::CpuUs, 2.0)].into(),
            ..one.clone()
        };
        let set = Set {
            samples: vec![one, two],
            ..Set::default()
        };
        let text = csv(&set);
        let lines: Vec<&str> = text.split("\r\n").collect();
        assert_eq!(
            lines,
            [
                "cell,side,engine,round,in-turns,seconds,seed,block,o-direct,queues,servers,flushes-asked,flushes-reached,command,iops,cpu-us",
                "\"a,\"\"b\"\"\",x,auto,0,false,0,0,4 KiB,,,,,,,1.5,",
                "\"a,\"\"b\"\"\",x,auto,0,false,0,0,,,,,,,,,2",
                ""
            ]
        );
    }

    /// The values of a column, of a table without quotes.
    fn column(table: &str, name: &str) -> Vec<String> {
        let mut lines = table.trim_end().split("\r\n");
        let head: Vec<&str> = lines.next().unwrap().split(',').collect();
        let place = head.iter().position(|own| *own == name).expect(name);
        lines
            .map(|line| line.split(',').nth(place).unwrap().to_owned())
            .collect()
    }

    #[test]
    fn configuration_stages_and_surroundings_are_there() {
        let sample = Sample {
            cell: "c".to_owned(),
            in_turns: true,
            seen: Some(Seen {
                direct: true,
                queues: 4,
                servers: 2,
                flushes: Some(Flushed {
                    asked: 16,
                    reached: 3,
                }),
                ..Seen::default()
            }),
            stages: [(
                "read".to_owned(),
                Totals {
                    count: 4,
                    sum_ns: Times([0, 0, 0, 0, 8000, 0, 0, 0]),
                },
            )]
            .into(),
            breakdown: Some(Breakdown {
                parts: vec![PartTime {
                    part: Part::Kick,
                    mean_ns: 1500.0,
                    deviation_ns: 0.0,
                    share: 1.0,
                }],
                runs: 1,
                requests: 1,
                dropped: 0,
                total_ns: 1500.0,
                total_deviation_ns: 0.0,
            }),
            detail: serde_json::json!({ "command": ["qsd", "--blockdev"] }),
            ..Sample::default()
        };
        let set = Set {
            runs: vec![Run {
                experiment: "E3".to_owned(),
                duration_s: 0.5,
                host: Host {
                    kernel: "6.1".to_owned(),
                    file_system: "ext4".to_owned(),
                    fio: Some("3.33".to_owned()),
                    ..Host::default()
                },
                ..Run::default()
            }],
            samples: vec![sample],
            ..Set::default()
        };
        let text = csv(&set);
        for (name, value) in [
            ("in-turns", "true"),
            ("o-direct", "true"),
            ("queues", "4"),
            ("servers", "2"),
            ("flushes-reached", "3"),
            ("command", "qsd --blockdev"),
            ("stage-read-device-us", "2"),
            ("breakdown-kick-us", "1.5"),
            ("experiment", "E3"),
            ("duration-s", "0.5"),
            ("kernel", "6.1"),
            ("file-system", "ext4"),
            ("fio", "3.33"),
            ("tapdisk", ""),
        ] {
            assert_eq!(column(&text, name), [value], "{name}");
        }
    }
}
