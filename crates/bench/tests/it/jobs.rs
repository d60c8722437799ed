//! fio's job files, done by fio and by us: what a server and what files have seen of both is the same.

use crate::common;

use bench::{
    fio, jobfile,
    load::{
        self, Shape, Spec,
        shape::{Runs, Sizes},
    },
};
use common::{LEN, count, serve, serve_chain};
use disk::{Chain, ChainOptions, DiskOptions};
use io::EngineKind;
use std::{collections::BTreeMap, fs, path::Path, process::Command};
use testkit::TempDir;
use trace::Operation;

/// A request as the server saw it.
type Asked = (Operation, u64, u64);

/// A job, in two runs at disks of their own: what each disk saw of fio, and of us.
fn both(job: &str) -> Option<[Vec<Asked>; 2]> {
    if Command::new("fio").arg("--version").output().is_err() {
        eprintln!("not tested: fio is not installed");
        return None;
    }
    let run = |ours: bool| {
        let dir = TempDir::new();
        fs::write(dir.path("disk.raw"), vec![0; LEN as usize]).unwrap();
        let chain = ChainOptions {
            format: Some(image::Format::Raw),
            ..ChainOptions::default()
        };
        let path = dir.path("disk.raw");
        let chain = Chain::open(path.to_str().unwrap(), &chain).unwrap();
        let options = DiskOptions {
            trace_entries: 8192,
            ..DiskOptions::default()
        };
        let served = serve_chain(dir, chain, options, EngineKind::Threads);
        let uri = format!("nbd+unix:///?socket={}", served.dir.path("nbd").display());
        let file = served.dir.path("job.fio");
        fs::write(
            &file,
            format!("[global]\nioengine=nbd\nuri={uri}\nbs=4k\n{job}\n"),
        )
        .unwrap();
        match ours {
            true => {
                let jobs = jobfile::read(&file, None, false).unwrap();
                jobs.run(|_| {}).unwrap();
            }
            false => {
                fio::run_file(&file).unwrap();
            }
        }
        // It notes a request after it has answered.
        let mut seen = Vec::new();
        for _ in 0..2000 {
            let now = served.requests();
            if !now.is_empty()
                && now == seen
                && served.disk.queue_traces().iter().all(|q| !q.is_live())
            {
                break;
            }
            seen = now;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        seen
    };
    Some([run(false), run(true)])
}

/// Requests by operation and size.
fn by_size(all: &[Asked]) -> BTreeMap<(&'static str, u64), u64> {
    all.iter()
        .fold(BTreeMap::new(), |mut counts, (operation, _, bytes)| {
            *counts.entry((operation.name(), *bytes)).or_default() += 1;
            counts
        })
}

fn bytes(all: &[Asked], operation: Operation) -> u64 {
    all.iter().filter(|a| a.0 == operation).map(|a| a.2).sum()
}

fn sorted(all: &[Asked]) -> Vec<(u64, u64, &'static str)> {
    let mut sorted: Vec<_> = all
        .iter()
        .map(|(op, at, len)| (*at, *len, op.name()))
        .collect();
    sorted.sort_unstable();
    sorted
}

/// Jobs of which nothing is left to chance but the order.
#[test]
fn fio_and_we_ask_for_the_same() {
    let mut wrong = Vec::new();
    for job in [
        "[a]\nrw=write\nsize=1m\nfsync=7\n",
        "[a]\nrw=randwrite\nsize=512k\nfsync=5\n",
        "[a]\nrw=randwrite\nsize=1m\n",
        "[a]\nrw=randread\nsize=1m\niodepth=16\nbs=8k\n",
        "[a]\nrw=read\nbs=16k\nsize=1m\noffset=128k\n",
        "[a]\nrw=write\nsize=1m\nio_size=2m\n",
        "[a]\nrw=write\nsize=1m\nio_size=256k\n",
        "[a]\nrw=read\nsize=256k\nloops=3\n",
        "[a]\nrw=randwrite\nsize=256k\nloops=2\n",
        "[a]\nrw=read\nsize=1m\nnumber_ios=10\n",
        "[a]\nrw=write\nsize=128k\noffset=64k\noffset_increment=128k\nnumjobs=3\n",
        "[a]\nrw=read:4k\nsize=1m\nnumber_ios=100\n",
        "[a]\nrw=read:-8k\nsize=1m\nnumber_ios=100\n",
        "[a]\nrw=write\nsize=1m\nthinktime=50us\nthinktime_blocks=4\niodepth=4\n",
        // fio 3.33 sleeps for ever where its spinning takes longer than the whole thinktime: that must not be short.
        "[a]\nrw=write\nsize=1m\nthinktime=50ms\nthinktime_spin=100us\nthinktime_blocks=100\nthinktime_blocks_type=issue\n",
        "[a]\nrw=read\nsize=256k\nrate_iops=5000\niodepth=2\n",
        "[a]\nrw=write\nsize=256k\nrate=20m\nrate_process=poisson\n",
        "[a]\nrw=write\nsize=128k\nstartdelay=100ms\n[b]\nstonewall\nrw=read\nsize=256k\n[c]\nwait_for=b\nrw=write\nsize=64k\n",
        "[a]\nrw=randrw\nrwmixwrite=100\nsize=512k\n",
    ] {
        let Some([fio, ours]) = both(job) else {
            return;
        };
        assert!(!ours.is_empty(), "{job}");
        let counts = (by_size(&fio), by_size(&ours));
        if counts.0 != counts.1 {
            wrong.push(format!("{job}: fio {:?}, we {:?}", counts.0, counts.1));
            continue;
        }
        let mut pairs = sorted(&fio).into_iter().zip(sorted(&ours));
        if let Some(pair) = pairs.find(|(fio, ours)| fio != ours) {
            wrong.push(format!("{job}: the first that differs: {pair:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Jobs with chance in them: as many bytes, of the same sizes and at the same places, in parts that are near each other.
#[test]
fn fio_and_we_draw_alike() {
    for job in [
        "[a]\nrw=randwrite\nbssplit=4k/70:64k/30\nsize=4m\nio_size=16m\nnorandommap\n",
        "[a]\nrw=randrw\nbssplit=4k/50:8k/50,16k\nsize=4m\nio_size=8m\nrwmixread=70\nnorandommap\n",
        "[a]\nrw=read\nbsrange=4k-16k\nsize=4m\n",
        "[a]\nrw=randread\nbsrange=8k-32k\nsize=4m\nio_size=8m\nnorandommap\n",
        "[a]\nrw=rw\nrwmixread=30\nsize=4m\n",
        "[a]\nrw=rw\nbs=4k,8k\nrwmixread=50\nsize=2m\n",
        "[a]\nrw=randread:8\nsize=4m\nnorandommap\n",
        "[a]\nrw=randread\npercentage_random=30\nsize=4m\nnorandommap\n",
        "[a]\nrw=randrw\nrate_iops=2000,500\nsize=4m\nio_size=1200k\nnorandommap\n",
        "[a]\nrw=randread\nblockalign=32k\nsize=4m\nnumber_ios=500\nnorandommap\n",
    ] {
        let Some([fio, ours]) = both(job) else {
            return;
        };
        let (theirs, own) = (by_size(&fio), by_size(&ours));
        let keys = |of: &BTreeMap<(&'static str, u64), u64>| of.keys().copied().collect::<Vec<_>>();
        assert_eq!(keys(&theirs), keys(&own), "{job}");
        for (what, count) in &theirs {
            let (a, b) = (*count as f64, own[what] as f64);
            // Five standard deviations, about.
            let far = 5.0 * (a.max(b) * 2.0).sqrt();
            assert!(
                (a - b).abs() <= far.max(a.max(b) * 0.05),
                "{job}: {what:?} {a} and {b}"
            );
        }
        let all = |of: &[Asked]| bytes(of, Operation::Read) + bytes(of, Operation::Write);
        // The last request may go beyond the end.
        assert!(
            all(&fio).abs_diff(all(&ours)) <= 64 << 10,
            "{job}: {} and {}",
            all(&fio),
            all(&ours)
        );
        let grain = |of: &[Asked]| {
            of.iter()
                .fold(0, |all, asked| all | asked.1)
                .trailing_zeros()
        };
        assert_eq!(
            grain(&fio),
            grain(&ours),
            "{job}: places at multiples of other sizes"
        );
        // How many go on where the last of their kind ended.
        let follows = |of: &[Asked]| {
            let mut ends = BTreeMap::new();
            let goes_on = of.iter().filter(|(operation, at, len)| {
                ends.insert(operation.name(), at + len) == Some(*at)
            });
            goes_on.count() as f64 / of.len() as f64
        };
        let (a, b) = (follows(&fio), follows(&ours));
        assert!(
            (a - b).abs() < 0.08,
            "{job}: of fio's {a} follow each other, of ours {b}"
        );
    }
}

/// Names, lengths and blocks that were written of the files of a folder.
fn files(dir: &Path) -> BTreeMap<String, (u64, Vec<usize>)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let bytes = fs::read(entry.path()).unwrap();
        let written = |block: &[u8]| block.iter().any(|byte| *byte != 0);
        let blocks = bytes
            .chunks(4096)
            .enumerate()
            .filter(|(_, block)| written(block));
        let blocks = blocks.map(|(n, _)| n).collect();
        let name = entry.file_name().to_str().unwrap().to_owned();
        all.insert(name, (bytes.len() as u64, blocks));
    }
    all
}

#[test]
fn fio_and_we_leave_the_same_files() {
    for job in [
        "[a]\nrw=write\nnrfiles=3\nsize=1200k\n",
        "[a]\nrw=write\nnrfiles=3\nsize=1200k\nnumber_ios=20\n",
        "[a]\nrw=write\nnrfiles=3\nsize=1200k\nnumber_ios=20\nfile_service_type=roundrobin:4\n",
        "[a]\nrw=write\nnrfiles=3\nsize=1200k\nnumber_ios=130\nfile_service_type=sequential\n",
        "[a]\nrw=write\nfilename=x:y\nsize=512k\nnumber_ios=21\n",
        "[a]\nrw=randwrite\nnrfiles=4\nsize=1m\n",
        "[a]\nrw=randwrite\nnrfiles=4\nsize=1m\nfile_service_type=random\n",
        "[a]\nrw=write\nfilesize=64k\nnrfiles=2\nnumjobs=2\n",
        "[a]\nrw=write\nfilename_format=f.$jobnum.$filenum\nnrfiles=2\nnumjobs=2\nsize=128k\nend_fsync=1\n",
        "[a]\nrw=read\nsize=64k\n[b]\nstonewall\nrw=write\nsize=64k\nunlink=1\n",
        "[a]\nrw=write\nsize=64k\nfallocate=truncate\nnumber_ios=3\n",
    ] {
        let run = |ours: bool| {
            let dir = TempDir::new();
            let file = dir.path("job.fio");
            fs::create_dir(dir.path("files")).unwrap();
            let folder = dir.path("files");
            let text = format!(
                "[global]\nioengine=psync\ndirectory={}\n{job}",
                folder.display()
            );
            fs::write(&file, text).unwrap();
            let outcome = match ours {
                true => jobfile::read(&file, None, false)
                    .and_then(|jobs| jobs.run(|_| {}))
                    .map(drop),
                false => fio::run_file(&file).map(drop),
            };
            outcome.map(|()| files(&folder))
        };
        let ours = run(true).unwrap();
        match run(false) {
            Ok(fio) => assert_eq!(ours, fio, "{job}"),
            Err(error) => return eprintln!("not tested: {error}"),
        }
    }
}

/// Requests of several sizes, at both kinds of servers and on both kinds of rings.
#[test]
fn shapes_reach_the_server() {
    for (which, indirect, packed) in [
        (0, true, false),
        (0, false, false),
        (0, true, true),
        (0, false, true),
        (1, true, false),
    ] {
        let served = serve(false);
        let mut spec = Spec {
            block_bytes: 64 << 10,
            depth: 8,
            indirect,
            packed,
            read_percent: 50,
            ..count(served.targets()[which].clone(), load::Pattern::RandRw, 400)
        };
        spec.shape = Shape {
            reads: Some(Sizes::Split(vec![(512, 40), (65536, 60)])),
            writes: Some(Sizes::Range(4096, 16384)),
            runs: Some(Runs::Sequential(2)),
            flush_by_queue: true,
            flush_at_end: true,
            ..Shape::default()
        };
        spec.flushes = load::Flushes::Every(10);
        let before = served.counts();
        let report = load::run(&spec).unwrap();
        assert_eq!((report.reads + report.writes, report.errors), (400, 0));
        assert_eq!(report.flushes, report.writes / 10);
        // The one at the end does not count.
        served.assert_grown(before, [report.reads, report.writes, report.flushes + 1]);
        let seen = served.requests();
        let sizes: Vec<_> = by_size(&seen).into_keys().collect();
        let expected = [
            ("flush", 0),
            ("read", 512),
            ("read", 65536),
            ("write", 4096),
            ("write", 8192),
            ("write", 12288),
            ("write", 16384),
        ];
        assert_eq!(sizes, expected, "{which}");
        assert_eq!(
            bytes(&seen, Operation::Read) + bytes(&seen, Operation::Write),
            report.bytes
        );
    }
}
