//! Clients that are connected and rest.

use crate::{
    driver::{BUFFERS, Machine, RAM, Setup},
    load::{Target, usage},
    machine::others::Watch,
    metric::{Metric, Metrics},
    peer::Running,
    sampling::{Measured, mib},
};
use block::{Context, Error, Result};
use serde_json::json;
use std::{thread, time::Duration, time::Instant};

/// How long a connection is left alone before it counts as resting.
const SETTLE: Duration = Duration::from_millis(300);

/// Connects a driver to each disk, has it started, and measures what the server costs while all of them rest.
pub(super) fn rest(running: &Running, duration: Duration) -> Result<Measured> {
    let setup = Setup {
        ram_bytes: (BUFFERS - RAM).next_multiple_of(2 << 20),
        ..Setup::default()
    };
    let connect = |target: &Target| match target {
        Target::VhostUser(socket) => {
            Machine::start(socket, setup).context(|| socket.display().to_string())
        }
        _ => Err(Error::invalid("only drivers of vhost-user-blk can rest")),
    };
    let machines = running
        .targets
        .iter()
        .map(connect)
        .collect::<Result<Vec<_>>>()?;
    thread::sleep(SETTLE);
    let watch = Watch::begin(&[running.pid()]);
    let (began, before) = (Instant::now(), usage::cpu(running.pid())?);
    thread::sleep(duration);
    let used = usage::cpu(running.pid())?.saturating_sub(before);
    let percent = used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;
    let metrics = Metrics::from([
        (Metric::IdlePercent, percent),
        (
            Metric::MemoryMib,
            mib(usage::Memory::of(running.pid())?.anonymous),
        ),
    ]);
    let detail = json!([{ "connected": machines.len(), "cpu_us": used.as_micros() as u64 }]);
    let mut measured = Measured {
        metrics,
        reports: detail,
        ..Measured::default()
    };
    measured.meanwhile(&watch.since());
    Ok(measured)
}
