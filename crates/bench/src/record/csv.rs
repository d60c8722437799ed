//! Samples as a table (RFC 4180): a line each, a column for each figure that any of them has.

use super::Sample;
use crate::metric::Metric;
use std::{collections::BTreeSet, fmt::Write};

/// The table of some samples, with a head. Figures that a sample lacks are empty.
pub fn csv(samples: &[Sample]) -> String {
    let metrics: BTreeSet<Metric> = samples
        .iter()
        .flat_map(|s| s.metrics.keys().copied())
        .collect();
    let mut axes: Vec<&str> = Vec::new();
    for (name, _) in samples.iter().flat_map(|s| &s.axes) {
        if !axes.contains(&name.as_str()) {
            axes.push(name);
        }
    }
    let mut text = String::from("cell,side,engine,round,seconds,seed");
    for axis in &axes {
        let _ = write!(text, ",{}", field(axis));
    }
    for metric in &metrics {
        let _ = write!(text, ",{}", metric.name());
    }
    text.push_str("\r\n");
    for sample in samples {
        let _ = write!(
            text,
            "{},{},{},{},{},{}",
            field(&sample.cell),
            field(&sample.side),
            field(&sample.engine),
            sample.round,
            sample.seconds,
            sample.seed
        );
        for axis in &axes {
            let value = sample.axes.iter().find(|(name, _)| name == axis);
            let _ = write!(
                text,
                ",{}",
                value.map_or_else(String::new, |(_, v)| field(v))
            );
        }
        for metric in &metrics {
            let value = sample.metric(*metric);
            let _ = write!(
                text,
                ",{}",
                value.map_or_else(String::new, |v| v.to_string())
            );
        }
        text.push_str("\r\n");
    }
    text
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
            let table = csv(std::slice::from_ref(&sample));
            let shown = table.trim_end().rsplit(',').next().unwrap();
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
        let text = csv(&[one, two]);
        let lines: Vec<&str> = text.split("\r\n").collect();
        assert_eq!(
            lines,
            [
                "cell,side,engine,round,seconds,seed,block,iops,cpu-us",
                "\"a,\"\"b\"\"\",x,auto,0,0,0,4 KiB,1.5,",
                "\"a,\"\"b\"\"\",x,auto,0,0,0,,,2",
                ""
            ]
        );
    }
}
