//! From facts to advice.

use super::{Advice, Basis, facts::Facts, measure::Measured};
use block::size::human;

/// Memory that a metadata cache takes by itself at most (`serve --metadata-cache`).
const CACHE_DEFAULT: u64 = 64 << 20;
/// Images of a chain before it is called long.
const CHAIN_LONG: usize = 3;
/// A share of the data that is worth to be spoken of.
const SOME: f64 = 0.1;
/// How much better a mode must be than the one that facts speak for, before its figure is followed.
const BETTER: f64 = 1.1;

/// A rotating disk needs milliseconds for a read at random; what answers sooner has no arm, whatever the kernel was told (a virtual
/// machine's disks are often said to rotate).
const ARM_US: f64 = 1000.0;

/// All advice on an image.
pub(super) fn advice(facts: &Facts, measured: Option<&Measured>) -> Vec<Advice> {
    let mut all = Vec::new();
    let median = measured.and_then(|measured| measured.median_alone_us());
    let known = Facts {
        rotational: match median {
            Some(us) if us < ARM_US => Some(false),
            _ => facts.rotational,
        },
        ..facts.clone()
    };
    let facts = &known;
    let mut say = |topic, what: String, because: String, rests_on| {
        all.push(Advice {
            topic,
            what,
            because,
            rests_on,
        });
    };
    if facts.path.is_some() {
        engine_and_cache(facts, measured, &mut say);
        device(facts, &mut say);
        queues(facts, measured, &mut say);
    }
    tables(facts, &mut say);
    space(facts, measured, &mut say);
    format(facts, &mut say);
    all
}

type Say<'a> = dyn FnMut(&'static str, String, String, Basis) + 'a;

fn engine_and_cache(facts: &Facts, measured: Option<&Measured>, say: &mut Say<'_>) {
    let cache = if facts.direct { "none" } else { "writeback" };
    let best = measured.and_then(|measured| measured.best());
    let of_facts = measured.and_then(|measured| measured.of(&facts.engine, facts.direct));
    // What was measured decides only where it says something clear: reads of a page cache are no disk's.
    let better = best.filter(|best| {
        let than = of_facts.map_or(0.0, |own| own.iops);
        best.direct == facts.direct && best.engine != facts.engine && best.iops > than * BETTER
    });
    match (better, of_facts) {
        (Some(best), Some(own)) => say(
            "engine",
            format!("serve --aio {}", best.engine),
            format!(
                "{:.0} random reads/s at depth 32, {} made {:.0}",
                best.iops, own.engine, own.iops
            ),
            Basis::Measurement,
        ),
        (_, Some(own)) => say(
            "engine",
            format!("serve --aio auto: it takes {}", facts.engine),
            format!(
                "{:.0} random reads/s at depth 32; no other was clearly faster",
                own.iops
            ),
            Basis::Measurement,
        ),
        _ => say(
            "engine",
            format!("serve --aio auto: it takes {}", facts.engine),
            facts.engine_because.clone(),
            Basis::Kernel,
        ),
    }
    match (facts.direct, &facts.direct_because) {
        (true, _) => say(
            "cache mode",
            format!("serve --cache {cache}"),
            format!(
                "O_DIRECT works, in multiples of {} bytes: data are not kept twice, in the guest and here",
                facts.alignment
            ),
            Basis::FileSystem,
        ),
        (false, why) => say(
            "cache mode",
            format!("serve --cache {cache}"),
            why.clone()
                .unwrap_or_else(|| "O_DIRECT does not work".to_owned()),
            Basis::FileSystem,
        ),
    }
    if facts.direct && facts.alignment > 512 {
        say(
            "guest",
            format!("give the guest blocks of {} bytes", facts.alignment),
            format!(
                "smaller writes are read, changed and written back in {} bytes",
                facts.alignment
            ),
            Basis::Device,
        );
    }
}

fn device(facts: &Facts, say: &mut Say<'_>) {
    let Some(scheduler) = &facts.scheduler else {
        return;
    };
    match (facts.rotational, scheduler.as_str()) {
        (Some(true), "none") => say(
            "scheduler",
            "echo mq-deadline > …/queue/scheduler".to_owned(),
            "the device says that it rotates, and has no scheduler that sorts".to_owned(),
            Basis::Device,
        ),
        (Some(false), "bfq") => say(
            "scheduler",
            "echo none > …/queue/scheduler".to_owned(),
            "the device does not rotate, and bfq costs CPU for each request".to_owned(),
            Basis::Device,
        ),
        _ => {}
    }
}

fn queues(facts: &Facts, measured: Option<&Measured>, say: &mut Say<'_>) {
    if facts.rotational == Some(true) {
        return say(
            "queues",
            "serve --queues 1".to_owned(),
            "the device rotates: more queues bring it no more requests than it can sort".to_owned(),
            Basis::Device,
        );
    }
    let queues = facts.cores.clamp(1, 4);
    let what =
        format!("serve --queues {queues}, or as many as the guest has CPUs if those are fewer");
    match measured.and_then(|measured| measured.scaling()) {
        Some(times) if times < 1.5 => say(
            "queues",
            "serve --queues 1".to_owned(),
            format!("32 reads at a time are only {times:.1} times as many as one at a time"),
            Basis::Measurement,
        ),
        Some(times) => say(
            "queues",
            what,
            format!("32 reads at a time are {times:.1} times as many as one at a time"),
            Basis::Measurement,
        ),
        None => say(
            "queues",
            what,
            format!(
                "the host has {} cores; one I/O thread serves all queues",
                facts.cores
            ),
            Basis::Kernel,
        ),
    }
}

fn tables(facts: &Facts, say: &mut Say<'_>) {
    if facts.tables == 0 {
        return;
    }
    let all = human(facts.tables);
    if facts.tables <= CACHE_DEFAULT {
        say(
            "metadata cache",
            "leave --metadata-cache as it is".to_owned(),
            format!("tables for the whole disk are {all}, which it keeps by itself"),
            Basis::Image,
        );
        return;
    }
    say(
        "metadata cache",
        format!(
            "serve --metadata-cache {}",
            facts.tables.next_multiple_of(1 << 20)
        ),
        format!(
            "tables for the whole disk are {all}, and {} are kept by itself: random requests would load them again and again",
            human(CACHE_DEFAULT)
        ),
        Basis::Image,
    );
    if facts.cluster_size < 1 << 20 && !facts.subclusters {
        say(
            "cluster size",
            "convert -o cluster_size=1M,extended_l2=on".to_owned(),
            format!(
                "clusters of {} make {all} of tables",
                human(facts.cluster_size)
            ),
            Basis::Image,
        );
    }
}

fn space(facts: &Facts, measured: Option<&Measured>, say: &mut Say<'_>) {
    let grows = matches!(facts.format.as_str(), "qcow2" | "raw");
    let sparse = facts.unallocated as f64 > facts.size as f64 * 0.5;
    if facts.chain > 1 || !grows || !sparse || facts.encrypted {
        return;
    }
    let written = measured.and_then(|measured| measured.write.as_ref());
    let (works, basis) = match (written, facts.fallocate) {
        (Some(write), _) => (Some(write.fallocate), Basis::Measurement),
        (None, known) => (known, Basis::FileSystem),
    };
    let free = format!("{} of the disk are not there yet", human(facts.unallocated));
    match works {
        Some(true) => say(
            "preallocation",
            "create -o preallocation=falloc where its first writes must be fast".to_owned(),
            format!("{free}, and space can be allocated without writing it"),
            basis,
        ),
        Some(false) => say(
            "preallocation",
            match facts.format.as_str() {
                "raw" => "create -o preallocation=full where its first writes must be fast",
                _ => "create -o preallocation=metadata where its first writes must be fast",
            }
            .to_owned(),
            format!("{free}, and space cannot be allocated without writing it"),
            basis,
        ),
        None => {}
    }
    if let Some(write) = written
        && !write.punch
    {
        say(
            "discards",
            "serve --discard ignore".to_owned(),
            "holes cannot be punched there".to_owned(),
            Basis::Measurement,
        );
    }
}

fn format(facts: &Facts, say: &mut Say<'_>) {
    let there = (facts.data + facts.data_below + facts.compressed).max(1) as f64;
    if let Some(why) = &facts.read_only_because {
        say(
            "format",
            "check --repair all".to_owned(),
            format!("it cannot be written: {why}"),
            Basis::Image,
        );
    }
    if !matches!(facts.format.as_str(), "raw" | "qcow2" | "luks" | "null") {
        say(
            "format",
            "convert -O qcow2, or raw where neither snapshots nor a small file are needed"
                .to_owned(),
            format!("{} has no snapshots, bitmaps or subclusters", facts.format),
            Basis::Image,
        );
    }
    if facts.compressed as f64 > there * SOME {
        say(
            "format",
            "convert without -c, if it is served".to_owned(),
            format!(
                "{} are compressed: each read of them unpacks a whole cluster, each write makes it anew",
                human(facts.compressed)
            ),
            Basis::Image,
        );
    }
    if facts.chain >= CHAIN_LONG {
        say(
            "chain",
            "commit or rebase it to fewer images".to_owned(),
            format!(
                "a request may ask {} images where its bytes are",
                facts.chain
            ),
            Basis::Image,
        );
    }
    if facts.format == "qcow2"
        && facts.chain > 1
        && !facts.subclusters
        && facts.cluster_size >= 65536
    {
        say(
            "cluster size",
            "create -o extended_l2=on,cluster_size=128k -b …".to_owned(),
            format!(
                "each first write to a cluster copies up to {} from below; with subclusters of 4 KiB nothing",
                human(facts.cluster_size)
            ),
            Basis::Image,
        );
    }
    if facts.version_2 {
        say(
            "format",
            "amend -o compat=1.1".to_owned(),
            "it is of version 2: zeros take clusters, and nothing that came later can be used"
                .to_owned(),
            Basis::Image,
        );
    }
    if facts.rotational == Some(true) && facts.data > 0 {
        let each = facts.data / facts.runs.max(1);
        if each < 1 << 20 {
            say(
                "format",
                "convert it: a copy lies in one piece".to_owned(),
                format!(
                    "its data lie in {} pieces of {} on a device that rotates",
                    facts.runs,
                    human(each)
                ),
                Basis::Image,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::advise::measure::{Rate, Write};

    fn plain() -> Facts {
        Facts {
            format: "qcow2".to_owned(),
            size: 10 << 30,
            cluster_size: 65536,
            chain: 1,
            data: 9 << 30,
            runs: 3,
            tables: 10 << 17,
            engine: "io_uring".to_owned(),
            engine_because: "the kernel offers io_uring".to_owned(),
            direct: true,
            alignment: 512,
            file_system: "ext4 (rw)".to_owned(),
            fallocate: Some(true),
            rotational: Some(false),
            scheduler: Some("none".to_owned()),
            cores: 2,
            path: Some("/x".into()),
            ..Facts::default()
        }
    }

    /// What is said, as topic and what to do.
    fn said(facts: &Facts, measured: Option<&Measured>) -> Vec<String> {
        let all = advice(facts, measured);
        assert!(all.iter().all(|a| !a.because.is_empty()));
        all.iter()
            .map(|a| format!("{}: {}", a.topic, a.what))
            .collect()
    }

    #[test]
    fn each_fact_has_its_advice() {
        let calm = said(&plain(), None);
        assert_eq!(calm.len(), 4, "{calm:?}");
        assert!(calm[0].contains("auto: it takes io_uring") && calm[1].contains("--cache none"));
        type Change = fn(&mut Facts);
        let cases: [(Change, &str); 17] = [
            (|f| f.direct = false, "--cache writeback"),
            (|f| f.alignment = 4096, "blocks of 4096 bytes"),
            (|f| f.tables = 100 << 20, "--metadata-cache 104857600"),
            (|f| f.tables = 100 << 20, "cluster_size=1M"),
            (|f| f.rotational = Some(true), "mq-deadline"),
            (|f| f.rotational = Some(true), "--queues 1"),
            (|f| f.scheduler = Some("bfq".to_owned()), "echo none"),
            (|f| f.unallocated = 9 << 30, "preallocation=falloc"),
            (
                |f| {
                    f.unallocated = 9 << 30;
                    f.fallocate = Some(false);
                },
                "preallocation=metadata",
            ),
            (|f| f.compressed = 5 << 30, "without -c"),
            (|f| f.chain = 4, "fewer images"),
            (|f| f.chain = 2, "extended_l2=on,cluster_size=128k"),
            (|f| f.format = "vmdk".to_owned(), "-O qcow2"),
            (
                |f| {
                    f.format = "raw".to_owned();
                    f.unallocated = 9 << 30;
                    f.fallocate = Some(false);
                },
                "preallocation=full",
            ),
            (
                |f| f.read_only_because = Some("it is marked corrupt".to_owned()),
                "check --repair all",
            ),
            (|f| f.version_2 = true, "compat=1.1"),
            (
                |f| {
                    f.rotational = Some(true);
                    f.runs = 10 << 10;
                },
                "lies in one piece",
            ),
        ];
        for (change, expected) in cases {
            assert!(
                !calm.iter().any(|line| line.contains(expected)),
                "{expected}"
            );
            let mut facts = plain();
            change(&mut facts);
            let lines = said(&facts, None);
            assert!(
                lines.iter().any(|line| line.contains(expected)),
                "{expected}: {lines:?}"
            );
        }
    }

    #[test]
    fn what_is_near_a_bound_or_does_not_matter_gets_none() {
        type Change = fn(&mut Facts);
        let cases: [(Change, &str); 12] = [
            (|f| f.tables = CACHE_DEFAULT, "serve --metadata-cache"),
            (|f| f.tables = 0, "metadata cache"),
            (
                |f| {
                    f.tables = 100 << 20;
                    f.cluster_size = 1 << 20;
                },
                "cluster size",
            ),
            (|f| f.unallocated = 5 << 30, "preallocation"),
            (
                |f| {
                    f.unallocated = 9 << 30;
                    f.encrypted = true;
                },
                "preallocation",
            ),
            (
                |f| {
                    f.unallocated = 9 << 30;
                    f.fallocate = None;
                },
                "preallocation",
            ),
            (|f| f.compressed = 1 << 29, "without -c"),
            (|f| f.chain = 2, "fewer images"),
            (
                |f| {
                    f.chain = 2;
                    f.subclusters = true;
                },
                "extended_l2",
            ),
            (
                |f| {
                    f.chain = 2;
                    f.cluster_size = 32768;
                },
                "extended_l2",
            ),
            (
                |f| {
                    f.rotational = Some(true);
                    f.runs = 9 << 10;
                },
                "one piece",
            ),
            (|f| f.path = None, "engine"),
        ];
        for (n, (change, not)) in cases.into_iter().enumerate() {
            let mut facts = plain();
            change(&mut facts);
            let lines = said(&facts, None);
            assert!(
                !lines.iter().any(|line| line.contains(not)),
                "{n}: {lines:?}"
            );
        }
    }

    #[test]
    fn what_was_measured_goes_before_what_is_known() {
        let rate = |engine: &str, depth, iops| Rate {
            engine: engine.to_owned(),
            direct: true,
            depth,
            iops,
            p50_us: 1.0,
        };
        let mut measured = Measured {
            rates: vec![
                rate("io_uring", 32, 1000.0),
                rate("threads", 32, 1050.0),
                rate("io_uring", 1, 900.0),
            ],
            write: None,
            notes: Vec::new(),
        };
        let lines = said(&plain(), Some(&measured));
        assert!(lines[0].contains("auto: it takes io_uring"), "{lines:?}");
        assert!(
            lines.iter().any(|l| l == "queues: serve --queues 1"),
            "{lines:?}"
        );
        // What answers in a microsecond has no arm.
        let mut told = plain();
        told.rotational = Some(true);
        let arm = |lines: &[String]| lines.iter().any(|l| l.contains("mq-deadline"));
        assert!(arm(&said(&told, None)) && !arm(&said(&told, Some(&measured))));
        measured.rates[1].iops = 1500.0;
        assert!(said(&plain(), Some(&measured))[0].contains("--aio threads"));
        measured.write = Some(Write {
            fallocate: false,
            punch: false,
            flush_us: None,
        });
        let mut facts = plain();
        facts.unallocated = 9 << 30;
        let lines = said(&facts, Some(&measured));
        assert!(
            lines.iter().any(|l| l.contains("preallocation=metadata")),
            "{lines:?}"
        );
        assert!(lines.iter().any(|l| l.contains("--discard ignore")));
    }
}
