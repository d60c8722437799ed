//! From facts to advice.

use super::{Advice, Basis, durable::Durable, facts::Facts, measure::Measured};
use block::size::human;

/// Memory that a metadata cache takes by itself at most (`serve --metadata-cache`).
const CACHE_DEFAULT: u64 = 64 << 20;
/// Images of a chain before it is called long.
const CHAIN_LONG: usize = 3;
/// A share of the data that is worth to be spoken of.
const SOME: f64 = 0.1;
/// How many times as long a durable write must take before it is worth to do something against it. Medians of writes in turns.
const SLOWER: f64 = 1.25;
/// How many times as many reads a second thread must bring, with as many at a time as the first, to be worth its core.
const MORE: f64 = 1.2;
/// Clusters of fewer bytes are called small.
const CLUSTER_SMALL: u64 = 32 << 10;
/// Pieces that data may lie in before they are called scattered.
const PIECES: u64 = 64;

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
    damage(facts, &mut say);
    if facts.path.is_some() {
        engine(facts, measured, &mut say);
        cache(facts, measured, &mut say);
        device(facts, &mut say);
        queues(facts, measured, &mut say);
    }
    tables(facts, &mut say);
    space(facts, measured, &mut say);
    format(facts, &mut say);
    all
}

type Say<'a> = dyn FnMut(&'static str, String, String, Basis) + 'a;

fn damage(facts: &Facts, say: &mut Say<'_>) {
    if facts.lost > 0 {
        say(
            "damage",
            "copy it again from where it came, or from a backup; serve it --read-only until then"
                .to_owned(),
            format!(
                "{} of its data would lie behind the end of its file, which was cut off",
                human(facts.lost)
            ),
            Basis::Image,
        );
    }
    if let Some(why) = &facts.read_only_because {
        say(
            "damage",
            "check --repair all".to_owned(),
            format!("it cannot be written: {why}"),
            Basis::Image,
        );
    }
}

fn engine(facts: &Facts, measured: Option<&Measured>, say: &mut Say<'_>) {
    let own = measured.and_then(|measured| measured.of(&facts.engine, 1));
    let best = measured.and_then(|measured| measured.best());
    let auto = format!("serve --aio auto: it takes {}", facts.engine);
    match (own, best) {
        (Some(own), Some(best)) if best.is_clearly_above(own) => say(
            "engine",
            format!("serve --aio {}", best.engine),
            format!(
                "{} random reads/s at depth {}; {} made {}",
                best.words(),
                best.depth,
                own.engine,
                own.words()
            ),
            Basis::Measurement,
        ),
        (Some(own), _) => say(
            "engine",
            auto,
            format!(
                "{} random reads/s at depth {}; no other was clearly faster",
                own.words(),
                own.depth
            ),
            Basis::Measurement,
        ),
        (None, _) => say("engine", auto, facts.engine_because.clone(), Basis::Kernel),
    }
}

fn cache(facts: &Facts, measured: Option<&Measured>, say: &mut Say<'_>) {
    let written = measured.and_then(|measured| measured.write.as_ref());
    let both = written.and_then(|write| Some((write.written_us?, write.cached_us?)));
    match (facts.direct, both) {
        (true, Some((direct, cached))) if direct > cached * SLOWER => say(
            "cache mode",
            "serve --cache writeback, if the host has memory to spare".to_owned(),
            format!(
                "a durable write of 4 KiB takes {cached:.0} µs through the page cache, and {direct:.0} µs past it"
            ),
            Basis::Measurement,
        ),
        (true, Some((direct, cached))) => say(
            "cache mode",
            "serve --cache none".to_owned(),
            format!(
                "a durable write of 4 KiB takes {direct:.0} µs past the page cache, and {cached:.0} µs through it: nothing is gained by keeping data twice, in the guest and here"
            ),
            Basis::Measurement,
        ),
        (true, None) => say(
            "cache mode",
            "serve --cache none".to_owned(),
            format!(
                "O_DIRECT works, in multiples of {} bytes: data are not kept twice, in the guest and here",
                facts.alignment
            ),
            Basis::FileSystem,
        ),
        (false, _) => say(
            "cache mode",
            "serve --cache writeback".to_owned(),
            (facts.direct_because.clone()).unwrap_or_else(|| "O_DIRECT does not work".to_owned()),
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
    let rates = measured.and_then(|measured| {
        let one = measured.of(&facts.engine, 1)?;
        Some((one, measured.of(&facts.engine, 2)?))
    });
    let as_many = facts.cores.clamp(1, 4);
    match rates {
        Some((one, two)) if two.is_clearly_above(one) && two.iops > one.iops * MORE => say(
            "queues",
            format!(
                "serve --queues {as_many} --io-threads 2, or as many queues as the guest has CPUs if those are fewer"
            ),
            format!(
                "two threads make {} random reads/s, one makes {}",
                two.words(),
                one.words()
            ),
            Basis::Measurement,
        ),
        Some((one, two)) => say(
            "queues",
            "serve --queues 1".to_owned(),
            format!(
                "one thread makes {} random reads/s, two make {}: the device is busy with one",
                one.words(),
                two.words()
            ),
            Basis::Measurement,
        ),
        None if facts.rotational == Some(true) => say(
            "queues",
            "serve --queues 1".to_owned(),
            "the device rotates: more queues bring it no more requests than it can sort".to_owned(),
            Basis::Device,
        ),
        None => say(
            "queues",
            format!(
                "serve --queues {as_many}, or as many as the guest has CPUs if those are fewer"
            ),
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
        format!("serve --metadata-cache {}M", facts.tables.div_ceil(1 << 20)),
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
    let written = measured.and_then(|measured| measured.write.as_ref());
    if let Some(write) = written.filter(|write| !write.punch) {
        say(
            "discards",
            "serve --discard ignore".to_owned(),
            format!("holes cannot be punched there ({})", write.line()),
            Basis::Measurement,
        );
    }
    let grows = matches!(facts.format.as_str(), "qcow2" | "raw");
    let sparse = facts.unallocated as f64 > facts.size as f64 * 0.5;
    if facts.chain > 1 || !grows || !sparse || facts.encrypted {
        return;
    }
    let free = format!("{} of the disk are not there yet", human(facts.unallocated));
    // A new image, or a copy of what there is.
    let how = match facts.data + facts.compressed {
        0 => "create",
        _ => "convert",
    };
    let first =
        |mode: &str| format!("{how} -o preallocation={mode} where its first writes must be fast");
    let raw = facts.format == "raw";
    // Space that is allocated but unwritten spares a qcow2 image its tables and the file system its search; what is written
    // spares it the change of unwritten extents too.
    if let Some(write) = written
        && let (Some(hole), Some(over)) = (write.hole_us, write.written_us)
    {
        let took = durable(write);
        let what = match write.allocated_us {
            _ if hole < over * SLOWER => {
                "leave it as it is: nothing is gained by preallocation".to_owned()
            }
            Some(allocated) if allocated < over * SLOWER => first("falloc"),
            _ => first("full"),
        };
        return say(
            "preallocation",
            what,
            format!("{free}; {took}"),
            Basis::Measurement,
        );
    }
    match facts.fallocate {
        Some(true) => say(
            "preallocation",
            first("falloc"),
            format!("{free}, and space can be allocated without writing it"),
            Basis::FileSystem,
        ),
        Some(false) => say(
            "preallocation",
            first(if raw { "full" } else { "metadata" }),
            format!("{free}, and space cannot be allocated without writing it"),
            Basis::FileSystem,
        ),
        None => {}
    }
}

/// What durable writes took, in words.
fn durable(write: &Durable) -> String {
    let of = |us: Option<f64>, what: &str| us.map(|us| format!("{us:.0} µs {what}"));
    let all = [
        of(write.hole_us, "into a hole"),
        of(write.allocated_us, "into allocated space"),
        of(write.written_us, "over what was written"),
    ];
    let all: Vec<String> = all.into_iter().flatten().collect();
    format!("a durable write of 4 KiB takes {}", all.join(", "))
}

fn format(facts: &Facts, say: &mut Say<'_>) {
    let there = (facts.data + facts.data_below + facts.compressed).max(1) as f64;
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
    if facts.format == "qcow2"
        && facts.cluster_size < CLUSTER_SMALL
        && !facts.subclusters
        && facts.tables <= CACHE_DEFAULT
    {
        say(
            "cluster size",
            "convert -o cluster_size=64k, or 128k with extended_l2=on where little is written at a time".to_owned(),
            format!(
                "clusters of {}: a write of 64 KiB allocates {} of them, which may lie anywhere in the file",
                human(facts.cluster_size),
                (64 << 10) / facts.cluster_size.max(1)
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
        if facts.runs >= PIECES && each < 1 << 20 {
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
    use crate::advise::measure::Rate;

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
        let cases: [(Change, &str); 20] = [
            (|f| f.direct = false, "--cache writeback"),
            (|f| f.alignment = 4096, "blocks of 4096 bytes"),
            (|f| f.tables = 100 << 20, "--metadata-cache 100M"),
            (|f| f.tables = 100 << 20, "cluster_size=1M"),
            (|f| f.rotational = Some(true), "mq-deadline"),
            (|f| f.rotational = Some(true), "--queues 1"),
            (|f| f.scheduler = Some("bfq".to_owned()), "echo none"),
            (
                |f| f.unallocated = 9 << 30,
                "convert -o preallocation=falloc",
            ),
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
            (|f| f.lost = 1 << 20, "copy it again"),
            (|f| f.cluster_size = 4096, "cluster_size=64k"),
            (
                |f| {
                    (f.unallocated, f.data) = (9 << 30, 0);
                },
                "create -o preallocation=falloc",
            ),
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
        let cases: [(Change, &str); 14] = [
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
            // A hole with a header before it lies in no pieces to speak of.
            (
                |f| {
                    f.rotational = Some(true);
                    (f.runs, f.data) = (1, 4096);
                },
                "one piece",
            ),
            (|f| f.cluster_size = 32768, "cluster size"),
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

    /// Reads at that many per second, a little more and a little less.
    fn rate(engine: &str, depth: u32, threads: u32, iops: f64) -> Rate {
        Rate {
            engine: engine.to_owned(),
            direct: true,
            depth,
            threads,
            rounds: 5,
            iops,
            iops_min: iops * 0.95,
            iops_max: iops * 1.05,
            p50_us: 1.0,
        }
    }

    #[test]
    fn what_was_measured_goes_before_what_is_known() {
        let mut measured = Measured {
            rates: vec![
                rate("io_uring", 1, 1, 900.0),
                rate("io_uring", 32, 1, 1000.0),
                rate("io_uring", 32, 2, 1100.0),
                rate("threads", 32, 1, 1050.0),
            ],
            ..Measured::default()
        };
        let has = |facts: &Facts, measured: &Measured, text: &str| {
            let all = advice(facts, Some(measured)).into_iter();
            let mut all = all.filter(|a| a.rests_on == Basis::Measurement);
            all.any(|a| a.what.contains(text) && !a.because.is_empty())
        };
        assert!(has(&plain(), &measured, "auto: it takes io_uring"));
        assert!(has(&plain(), &measured, "--queues 1"));
        // What answers in a microsecond has no arm.
        let mut told = plain();
        told.rotational = Some(true);
        let arm = |lines: &[String]| lines.iter().any(|l| l.contains("mq-deadline"));
        assert!(arm(&said(&told, None)) && !arm(&said(&told, Some(&measured))));
        // What one thread leaves of a device, two may use.
        measured.rates[2] = rate("io_uring", 32, 2, 1600.0);
        assert!(has(&plain(), &measured, "--queues 2 --io-threads 2"));
        // Much more in the median is nothing where one round was as slow as the other engine's fastest, or there were too few.
        measured.rates[3] = rate("threads", 32, 1, 1500.0);
        assert!(has(&plain(), &measured, "--aio threads"));
        measured.rates[3].iops_min = 1040.0;
        assert!(has(&plain(), &measured, "auto: it takes io_uring"));
        measured.rates[3] = Rate {
            rounds: 2,
            ..rate("threads", 32, 1, 1500.0)
        };
        assert!(has(&plain(), &measured, "auto: it takes io_uring"));
    }

    #[test]
    fn durable_writes_say_what_preallocation_and_cache_are_worth() {
        let mut facts = plain();
        facts.unallocated = 9 << 30;
        let write = |times: [Option<f64>; 4], punch| Measured {
            write: Some(Durable {
                fallocate: times[1].is_some(),
                punch,
                direct: true,
                writes: 200,
                hole_us: times[0],
                allocated_us: times[1],
                written_us: times[2],
                cached_us: times[3],
            }),
            ..Measured::default()
        };
        let us = |n| Some(f64::from(n));
        for (times, expected) in [
            ([us(300), us(110), us(100), us(100)], "=falloc"),
            ([us(300), us(250), us(100), us(100)], "=full"),
            ([us(300), None, us(100), us(100)], "=full"),
            ([us(110), us(110), us(100), us(100)], "leave it as it is"),
            ([us(110), us(110), us(100), us(100)], "--cache none"),
            ([us(110), us(110), us(100), us(70)], "--cache writeback"),
        ] {
            let measured = write(times, true);
            let all = advice(&facts, Some(&measured));
            let found = all.iter().find(|a| a.what.contains(expected));
            let found = found.unwrap_or_else(|| panic!("{expected}: {all:?}"));
            assert_eq!(found.rests_on, Basis::Measurement);
            assert!(found.because.contains("100 µs"), "{}", found.because);
            assert!(!all.iter().any(|a| a.topic == "discards"));
        }
        // No write ended in the time: what is known of the file system counts.
        let none = said(&facts, Some(&write([None; 4], false)));
        assert!(none.iter().any(|l| l.contains("preallocation=falloc")));
        assert!(none.iter().any(|l| l.contains("--discard ignore")));
    }
}
