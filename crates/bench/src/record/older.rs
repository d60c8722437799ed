//! What earlier schemas wrote otherwise.

use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use trace::{Stage, Totals};

/// Times of stages in either schema.
#[derive(Deserialize)]
#[serde(untagged)]
enum Stages {
    /// Of 3.
    Totals(Totals),
    /// Of 2: means of five stages, in microseconds.
    Means {
        count: u64,
        map_us: f64,
        submit_us: f64,
        device_us: f64,
        complete_us: f64,
        notify_us: f64,
    },
}

impl From<Stages> for Totals {
    fn from(stages: Stages) -> Self {
        match stages {
            Stages::Totals(totals) => totals,
            Stages::Means {
                count,
                map_us,
                submit_us,
                device_us,
                complete_us,
                notify_us,
            } => {
                let mut totals = Totals {
                    count,
                    ..Totals::default()
                };
                for (stage, us) in [
                    (Stage::Map, map_us),
                    (Stage::Submit, submit_us),
                    (Stage::Device, device_us),
                    (Stage::Complete, complete_us),
                    (Stage::Notify, notify_us),
                ] {
                    // Saturates, should a file say anything.
                    totals.sum_ns[stage] = (us * 1000.0 * count as f64).round() as u64;
                }
                totals
            }
        }
    }
}

/// [`super::Sample::stages`], of any schema.
pub(super) fn stages<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, Totals>, D::Error> {
    let stages = BTreeMap::<String, Stages>::deserialize(deserializer)?;
    Ok(stages.into_iter().map(|(o, s)| (o, s.into())).collect())
}
