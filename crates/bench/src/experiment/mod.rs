//! The background's studies as experiments: what each measures and found is data ([`plan`]), one command runs it
//! ([`run()`]), and what was published stands beside what is found here ([`judge`]).
//!
//! `DIR/records.jsonl` holds the [records](crate::record). A run that was interrupted goes on where it was: samples that
//! are there are not taken again. What a run sets up (servers, images, file systems on loop devices) lies below `DIR/work`
//! and ends with it: at its end, on an error, on ^C ([`crate::machine::process::stop`], then [`clear`]), and what a killed run left
//! is found there by the next.

mod e0;
mod e1;
mod e2;
mod e3;
mod finding;
mod guest;
mod lab;
mod measure;
mod mounted;
pub mod plan;
mod run;
mod runner;
mod schedule;

pub use finding::{Judged, Verdict, judge, left_out_words, tally};
pub use plan::{Cell, Experiment};
pub use run::{Cleared, Event, Options, Progress, cells, clear, list, run};

use block::{Error, Result};

/// Every experiment.
pub fn all() -> Vec<Experiment> {
    vec![
        e0::experiment(),
        e1::experiment(),
        e2::experiment(),
        e3::experiment(),
    ]
}

/// The experiment of that name, in upper or lower case.
///
/// # Errors
///
/// There is none.
pub fn find(name: &str) -> Result<Experiment> {
    let mut all = all();
    let names: Vec<&str> = all.iter().map(|e| e.name).collect();
    let names = names.join(", ");
    let place = all.iter().position(|e| e.name.eq_ignore_ascii_case(name));
    place.map(|place| all.swap_remove(place)).ok_or_else(|| {
        Error::invalid(format!(
            "there is no experiment '{name}'; there are {names}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use plan::Term;
    use std::collections::BTreeSet;

    #[test]
    fn tables_are_sound() {
        for experiment in all() {
            let mut names = BTreeSet::new();
            for cell in &experiment.cells {
                let id = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                assert!(cell.name.chars().all(id), "{}", cell.name);
                assert!(names.insert(cell.name.clone()), "{} twice", cell.name);
                let sides: BTreeSet<_> = cell.sides.iter().map(|s| &s.name).collect();
                assert_eq!(sides.len(), cell.sides.len(), "{}", cell.name);
                assert!(
                    cell.axes
                        .iter()
                        .all(|(name, value)| !name.is_empty() && !value.is_empty())
                );
            }
            assert!(experiment.cells.iter().any(|cell| cell.quick));
            assert!(!experiment.findings.is_empty() && !experiment.figures.is_empty());
            // What findings are about is there.
            let known = |term: &Term| {
                let cell = experiment.cells.iter().find(|cell| cell.name == term.cell);
                let cell = cell.unwrap_or_else(|| panic!("{term:?}"));
                let others = [term.over.as_ref(), term.or.as_ref()].into_iter().flatten();
                for side in others.chain([&term.side]) {
                    assert!(cell.sides.iter().any(|s| s.name == *side), "{term:?}");
                }
            };
            for finding in &experiment.findings {
                known(&finding.left);
                finding.right.iter().for_each(known);
            }
        }
        assert_eq!(find("e3").unwrap().name, "E3");
        let error = find("E9").unwrap_err().to_string();
        assert!(error.contains("'E9'; there are E0, E1, E2, E3"), "{error}");
    }

    #[test]
    fn a_quick_run_fits_its_time() {
        for experiment in all() {
            let sides: usize = cells(&experiment, true, None)
                .unwrap()
                .iter()
                .map(|cell| cell.sides.len())
                .sum();
            // Three rounds of some 0.9 s a sample within ten minutes, images besides.
            assert!(sides * 3 < 600, "{}: {sides} sides", experiment.name);
            let all = cells(&experiment, false, None).unwrap().len();
            assert_eq!(all, experiment.cells.len());
        }
        let e3 = find("E3").unwrap();
        assert_eq!(cells(&e3, true, Some("read-4k")).unwrap().len(), 1);
        let error = cells(&e3, true, Some("none*")).unwrap_err().to_string();
        assert!(
            error.contains("'none*'") && error.contains("read-4k"),
            "{error}"
        );
    }
}
