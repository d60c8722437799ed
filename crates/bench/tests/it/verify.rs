//! Verify mode: against servers that keep what they promise, servers that lie, and disks that changed while nobody looked.

use crate::common;

use bench::load::{self, FaultKind, Flushes, Pattern, Report, Spec, Target, Verified, Verify};
use common::{LEN, count, serve, serve_in};
use std::{
    collections::VecDeque,
    fs,
    io::{Read, Result, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Mutex},
};
use testkit::TempDir;

fn verified(report: &Report) -> &Verified {
    report.verify.as_ref().unwrap()
}

/// Kind and offset of each fault, by offset.
fn faults(report: &Report) -> Vec<(FaultKind, u64)> {
    let faults = verified(report).faults.iter();
    let mut faults: Vec<_> = faults.map(|fault| (fault.kind, fault.offset)).collect();
    faults.sort_by_key(|fault| fault.1);
    faults
}

/// Many requests for few blocks, at the same time, from several queues.
#[test]
fn who_keeps_his_promises_passes() {
    let served = serve(false);
    let file = Target::File {
        path: served.dir.path("other.raw"),
        engine: "threads".into(),
        direct: false,
    };
    fs::write(served.dir.path("other.raw"), vec![0; LEN as usize]).unwrap();
    for target in served.targets().into_iter().chain([file]) {
        for (pattern, flushes) in [
            (Pattern::RandRw, Flushes::Every(3)),
            (Pattern::Write, Flushes::Never),
        ] {
            let spec = Spec {
                range_bytes: Some(80 * 4096),
                read_percent: 50,
                queues: 2,
                flushes,
                verify: Some(Verify::default()),
                ..count(target.clone(), pattern, 3000)
            };
            let report = load::run(&spec).unwrap();
            assert_eq!(report.reads + report.writes, 3000);
            let verified = verified(&report);
            assert_eq!(verified.bad(), 0, "{verified:?}");
            assert_eq!(verified.written, report.writes);
            // In the load, and all 80 behind it.
            assert_eq!(verified.checked, report.reads + 80);
        }
    }
    let spec = Spec {
        range_bytes: Some(8192),
        verify: Some(Verify::default()),
        ..count(served.targets()[0].clone(), Pattern::RandRw, 10)
    };
    let error = load::run(&spec).unwrap_err().to_string();
    assert!(error.contains("lower --depth"), "{error}");
}

/// What a server does to its write number 10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    None,
    /// Says that it was done.
    Drop,
    /// Puts it where the next one belongs, and that one in its place.
    Swap,
    /// Puts its first sector there.
    Tear,
    /// Answers reads with what came before.
    Misread,
    /// None, but a flush on one connection is none for others.
    Alone,
}

/// An NBD server of one connection after the other, with simple replies: its disk is what is done to it.
fn liar(socket: &Path, lie: Lie) {
    let listener = UnixListener::bind(socket).unwrap();
    let disk = Arc::new(Mutex::new(vec![0; 64 * 4096]));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // The client's end ends it.
            let _ = talk(stream, &disk, lie);
        }
    });
}

fn number<const N: usize>(stream: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes
        .iter()
        .fold(0, |all, byte| all << 8 | u64::from(*byte)))
}

fn talk(mut stream: UnixStream, disk: &Mutex<Vec<u8>>, lie: Lie) -> Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    number::<4>(&mut stream)?;
    loop {
        number::<8>(&mut stream)?;
        let (option, len) = (number::<4>(&mut stream)? as u32, number::<4>(&mut stream)?);
        stream.read_exact(&mut vec![0; len as usize])?;
        let mut answer = |kind: u32, data: &[u8]| {
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            stream.write_all(&bytes)
        };
        // NBD_OPT_GO is answered, all else is not supported.
        if option != 7 {
            answer(1 << 31 | 1, &[])?;
            continue;
        }
        let mut info = vec![0, 0];
        info.extend((64 * 4096_u64).to_be_bytes());
        // It flushes, and (1 << 8) for all connections.
        info.extend([u8::from(lie != Lie::Alone), 5]);
        answer(3, &info)?;
        answer(1, &[])?;
        break;
    }
    let mut writes = 0;
    let mut held: VecDeque<(usize, Vec<u8>)> = VecDeque::new();
    let mut last = vec![0; 4096];
    loop {
        number::<4>(&mut stream)?;
        let kind = number::<4>(&mut stream)?;
        let cookie = number::<8>(&mut stream)?;
        let at = number::<8>(&mut stream)? as usize;
        let len = number::<4>(&mut stream)? as usize;
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend([0; 4]);
        reply.extend(cookie.to_be_bytes());
        let mut disk = disk.lock().unwrap();
        match kind {
            0 => {
                let here = disk[at..at + len].to_vec();
                let before = std::mem::replace(&mut last, here.clone());
                reply.extend(if lie == Lie::Misread { before } else { here });
            }
            1 => {
                let mut data = vec![0; len];
                stream.read_exact(&mut data)?;
                writes += 1;
                match (lie, writes) {
                    (Lie::Drop, 10) => {}
                    (Lie::Tear, 10) => disk[at..at + 512].copy_from_slice(&data[..512]),
                    (Lie::Swap, 10) => held.push_back((at, data)),
                    (Lie::Swap, 11) => {
                        let (other, early) = held.pop_front().unwrap();
                        disk[at..at + len].copy_from_slice(&early);
                        disk[other..other + len].copy_from_slice(&data);
                    }
                    _ => disk[at..at + len].copy_from_slice(&data),
                }
            }
            // A flush, or the end.
            2 => return Ok(()),
            _ => {}
        }
        stream.write_all(&reply)?;
    }
}

#[test]
fn lies_are_found_where_they_are() {
    let tenth = 9 * 4096;
    for (lie, expected) in [
        (Lie::None, vec![]),
        (Lie::Drop, vec![(FaultKind::Stale, tenth)]),
        (Lie::Tear, vec![(FaultKind::Torn, tenth)]),
        (
            Lie::Swap,
            vec![(FaultKind::Wrong, tenth), (FaultKind::Wrong, tenth + 4096)],
        ),
    ] {
        let dir = TempDir::new();
        liar(&dir.path("s"), lie);
        let target = Target::Nbd(format!("unix:{}", dir.path("s").display()));
        let spec = Spec {
            depth: 4,
            verify: Some(Verify::default()),
            ..count(target, Pattern::Write, 64)
        };
        let report = load::run(&spec).unwrap();
        assert_eq!(faults(&report), expected, "{lie:?}");
        let verified = verified(&report);
        assert_eq!((verified.written, verified.checked), (64, 64));
        assert_eq!(verified.bad(), expected.len() as u64);
        if lie == Lie::Swap {
            let text = verified.faults[0].to_string();
            let says = "wrong: at 36864, in 8 of 8 sectors from 36864 on: generation 1 was expected, generation 1 of offset 40960";
            assert!(text.starts_with(says), "{text}");
        }
    }
}

#[test]
fn reads_of_the_load_itself_are_compared() {
    let dir = TempDir::new();
    liar(&dir.path("s"), Lie::Misread);
    let target = Target::Nbd(format!("unix:{}", dir.path("s").display()));
    let spec = Spec {
        depth: 2,
        read_percent: 50,
        verify: Some(Verify::default()),
        ..count(target, Pattern::RandRw, 200)
    };
    let report = load::run(&spec).unwrap();
    // More than the 64 behind the load could tell.
    assert!(verified(&report).wrong > 64, "{:?}", verified(&report));
}

#[test]
fn a_later_load_knows_what_must_be_there() {
    let served = serve(false);
    let state = served.dir.path("state");
    let load_on = |target: Target, pattern: Pattern, ios: u64| {
        let spec = Spec {
            range_bytes: Some(64 * 4096),
            depth: 8,
            verify: Some(Verify {
                state: Some(state.clone()),
            }),
            ..count(target, pattern, ios)
        };
        load::run(&spec)
    };
    let [vhost, nbd] = served.targets();
    load_on(vhost, Pattern::Write, 64).unwrap();
    let earlier = fs::read(served.dir.path("disk.raw")).unwrap();
    let report = load_on(nbd, Pattern::Write, 64).unwrap();
    assert_eq!(verified(&report).bad(), 0);
    assert_eq!(verified(&report).checked, 128);
    // The server ends, and others are at the file.
    let dir = served.end();
    let path = dir.path("disk.raw");
    let mut bytes = fs::read(&path).unwrap();
    let block = |n: usize| n * 4096..(n + 1) * 4096;
    bytes[block(3)].copy_from_slice(&earlier[block(3)]);
    bytes[block(7)][1024..].copy_from_slice(&earlier[block(7)][1024..]);
    let other = bytes[block(20)].to_vec();
    bytes[block(21)].copy_from_slice(&other);
    bytes[block(40)][17] ^= 1;
    bytes[block(50)].fill(0);
    fs::write(&path, bytes).unwrap();
    let served = serve_in(dir, false);
    for target in served.targets() {
        let report = load_on(target, Pattern::Read, 64).unwrap();
        let expected = [
            (FaultKind::Stale, 3),
            (FaultKind::Torn, 7),
            (FaultKind::Wrong, 21),
            (FaultKind::Wrong, 40),
            (FaultKind::Stale, 50),
        ];
        // Before the load, and in it.
        let twice: Vec<_> = expected.iter().flat_map(|f| [*f, *f]).collect();
        let found = faults(&report).into_iter();
        let found: Vec<_> = found.map(|(kind, at)| (kind, at / 4096)).collect();
        assert_eq!(found, twice);
    }
    // Written again, all is well.
    let report = load_on(served.targets()[0].clone(), Pattern::Write, 64).unwrap();
    assert_eq!(verified(&report).bad(), 5);
    let report = load_on(served.targets()[1].clone(), Pattern::Read, 64).unwrap();
    assert_eq!(verified(&report).bad(), 0);
}

/// Where the server vanishes, what it has not flushed may be there or not; what it has must.
#[test]
fn a_load_that_ends_early_leaves_what_it_knows() {
    let mut served = serve(false);
    let state = served.dir.path("state");
    let spec = |target: Target, pattern: Pattern, ios: u64| Spec {
        range_bytes: Some(64 * 4096),
        depth: 4,
        flushes: if pattern == Pattern::Read {
            Flushes::Never
        } else {
            Flushes::Every(5)
        },
        verify: Some(Verify {
            state: Some(state.clone()),
        }),
        ..count(target, pattern, ios)
    };
    let endless = spec(served.targets()[0].clone(), Pattern::RandWrite, u64::MAX);
    let running = std::thread::spawn(move || load::run(&endless));
    while served.counts()[1] < 500 {
        std::thread::yield_now();
    }
    drop(served.vhost.take());
    running.join().unwrap().unwrap_err();
    let served = serve_in(served.end(), false);
    let report = load::run(&spec(served.targets()[0].clone(), Pattern::Read, 64)).unwrap();
    let verified = verified(&report);
    assert_eq!(verified.bad(), 0, "{verified:?}");
    assert!(verified.checked > 64 && verified.checked <= 128);
}

/// Its flushes say nothing of what other connections wrote.
#[test]
fn a_server_whose_connections_are_apart_is_verified_through_one() {
    let dir = TempDir::new();
    liar(&dir.path("s"), Lie::Alone);
    let target = Target::Nbd(format!("unix:{}", dir.path("s").display()));
    let spec = |queues: u32| Spec {
        queues,
        verify: Some(Verify::default()),
        ..count(target.clone(), Pattern::Write, 64)
    };
    let error = load::run(&spec(2)).unwrap_err().to_string();
    assert!(error.contains("give --queues 1"), "{error}");
    assert_eq!(verified(&load::run(&spec(1)).unwrap()).bad(), 0);
}
