//! Whether figures can be believed: a machine with other things to do, samples that lie far apart.

use crate::{
    metric::{Metric, Metrics},
    statistics::Summary,
};

/// Samples that lie this far apart, in parts of their median, call the machine noisy.
pub const NOISY: f64 = 0.4;
/// Percent of a core that others may use before the reader is told: the kernel's own threads take some.
const OTHERS: f64 = 40.0;
/// Percent of a core that the hypervisor may keep.
const STOLEN: f64 = 10.0;

/// Says so where samples of one side lie far apart.
pub fn noise(name: &str, metric: Metric, values: &[f64]) -> Option<String> {
    let summary = Summary::of(values)?;
    (summary.count > 1 && summary.spread() > NOISY).then(|| {
        format!(
            "noisy: the {} of {name} lie {:.0} % apart",
            metric.title(),
            summary.spread() * 100.0
        )
    })
}

/// Says so where the machine had other things to do while samples were taken.
pub fn restless<'a>(samples: impl Iterator<Item = &'a Metrics> + Clone) -> Vec<String> {
    let over = |metric: Metric, limit: f64| {
        let values = samples.clone().filter_map(|m| m.get(&metric).copied());
        let over: Vec<f64> = values.filter(|value| *value > limit).collect();
        let most = over.iter().copied().reduce(f64::max)?;
        Some((most, over.len()))
    };
    let mut notes = Vec::new();
    if let Some((most, samples)) = over(Metric::OthersPercent, OTHERS) {
        notes.push(format!(
            "the machine was not idle: others used up to {most:.0} % of a core during {samples} samples"
        ));
    }
    if let Some((most, samples)) = over(Metric::StealPercent, STOLEN) {
        notes.push(format!(
            "the hypervisor kept up to {most:.0} % of a core during {samples} samples"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_rests_is_not_mentioned() {
        let calm = Metrics::from([(Metric::OthersPercent, 5.0), (Metric::StealPercent, 1.0)]);
        let busy = Metrics::from([(Metric::OthersPercent, 80.0), (Metric::StealPercent, 30.0)]);
        assert!(restless([&calm].into_iter()).is_empty());
        let notes = restless([&calm, &busy, &busy].into_iter());
        assert!(
            notes[0].contains("up to 80 % of a core during 2 samples"),
            "{notes:?}"
        );
        assert!(notes[1].contains("kept up to 30 %"), "{notes:?}");
        assert_eq!(noise("x", Metric::Iops, &[100.0, 110.0]), None);
        assert_eq!(noise("x", Metric::Iops, &[100.0]), None);
        let note = noise("x", Metric::Iops, &[50.0, 100.0, 110.0]).unwrap();
        assert_eq!(note, "noisy: the IOPS of x lie 60 % apart");
    }
}
