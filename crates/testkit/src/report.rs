//! The lines in which a guest reports, read.

use std::collections::BTreeMap;
use std::time::Duration;

/// What a guest reported.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The figures, by name; of a name that came several times the last one.
    pub values: BTreeMap<String, String>,
    /// The steps that passed, in order (`fs-ext4.mkfs`).
    pub steps: Vec<String>,
    /// How long the machine ran, by the host's clock.
    pub wall: Duration,
}

impl Report {
    /// Reads the lines `DP NAME=VALUE`, `DP step=NAME ok …` and `DP result=fail step=NAME`.
    pub fn parse(results: &str) -> Self {
        let mut report = Self::default();
        for line in results
            .lines()
            .filter_map(|line| line.trim().strip_prefix("DP "))
        {
            let Some((name, value)) = line.split_once('=') else {
                continue;
            };
            match name {
                "step" => report
                    .steps
                    .extend(value.split_once(" ok").map(|(step, _)| step.to_owned())),
                "result" => {
                    let (result, step) = value.split_once(" step=").unwrap_or((value, ""));
                    report.values.insert("result".to_owned(), result.to_owned());
                    report
                        .values
                        .insert("failed_step".to_owned(), step.to_owned());
                }
                _ => drop(report.values.insert(name.to_owned(), value.to_owned())),
            }
        }
        report
    }

    /// A figure that must be there.
    #[track_caller]
    pub fn value(&self, name: &str) -> &str {
        match self.values.get(name) {
            Some(value) => value,
            None => panic!("the guest reported no '{name}', only: {:?}", self.values),
        }
    }

    /// A figure that must be a whole number; the part after a decimal point is dropped.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        let value = self.value(name);
        let whole = value.split('.').next().unwrap_or(value);
        whole
            .parse()
            .unwrap_or_else(|_| panic!("the guest reported '{name}={value}', which is no number"))
    }

    /// Whether a step was run and passed.
    pub fn passed(&self, step: &str) -> bool {
        self.steps.iter().any(|passed| passed == step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_values_and_steps() {
        let report = Report::parse(
            "noise\nDP boot_s=3.21\nDP vda.write_cache=write back\nDP step=fs-ext4.mkfs ok t=4.1\nDP n=1\nDP n=2\nDP result=ok\n",
        );
        assert_eq!(report.value("vda.write_cache"), "write back");
        assert_eq!((report.number("boot_s"), report.number("n")), (3, 2));
        assert!(report.passed("fs-ext4.mkfs") && !report.passed("fs-ext4"));
        assert_eq!(report.value("result"), "ok");
    }

    #[test]
    fn a_report_names_the_step_that_failed() {
        let report =
            Report::parse("DP step=verify.libaio ok t=1\nDP result=fail step=verify.io_uring");
        assert_eq!(
            (report.value("result"), report.value("failed_step")),
            ("fail", "verify.io_uring")
        );
    }

    #[test]
    #[should_panic(expected = "reported no 'x'")]
    fn a_figure_that_is_not_there_is_named() {
        Report::default().value("x");
    }
}
