//! Edits: what they change, what they refuse, and what a crash leaves of them.

use super::super::testing::{Checked, Driver, MemFile, Rng, check, crashes};
use super::super::{CreateOptions, Header, OpenOptions, create, extensions};
use super::Editor;
use super::switch::pieces;
use block::ErrorKind;
use extensions::Extension;
use std::fs;

fn options(cluster_size: u64, refcount_bits: u32) -> CreateOptions {
    CreateOptions {
        size: 4 << 20,
        cluster_size,
        refcount_bits,
        ..CreateOptions::default()
    }
}

/// An image with some content.
fn image(options: &CreateOptions) -> MemFile {
    let mut driver = Driver::create(options, &OpenOptions::default());
    for at in [0, 100_000, 3 << 20] {
        driver.write(at, &[7; 5000]).unwrap();
    }
    MemFile::of(driver.close())
}

fn opinion(bytes: &[u8]) -> Checked {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    check(file.path())
}

fn with_extension(header: &Header, kind: u32, len: usize) -> Header {
    let mut header = header.clone();
    header.extensions.retain(|e| e.kind != kind);
    header.extensions.push(Extension {
        kind,
        data: vec![kind as u8; len],
    });
    header
}

/// Without what is only for people.
fn meaning(header: &Header) -> Header {
    let mut header = header.clone();
    header
        .extensions
        .retain(|e| e.kind != extensions::FEATURE_NAMES);
    header
}

#[test]
fn a_crash_leaves_all_of_an_edit_or_nothing() {
    for (cluster, bits) in [(512, 64), (512, 1), (4096, 2), (65536, 16), (4096, 8)] {
        let file = image(&options(cluster, bits));
        let before = file.bytes();
        let old = Header::parse(&before).unwrap();
        file.record();
        let mut editor = Editor::open(&file, "t").unwrap();
        let one = editor.allocate(1).unwrap();
        let run = editor.allocate(40).unwrap();
        assert!(one < run || run + 40 * cluster <= one);
        editor
            .write(run, &vec![0xab; 40 * cluster as usize])
            .unwrap();
        editor.free(one, 1).unwrap();
        assert_eq!(editor.refcount(one).unwrap(), 0);
        assert_eq!(editor.refcount(run + cluster).unwrap(), 1);
        // A new L1 table, as a snapshot or a resize makes one.
        let l1_bytes = u64::from(old.l1_size) * 8;
        let l1 = editor.read(old.l1_table_offset, l1_bytes as usize).unwrap();
        let at = editor.allocate(l1_bytes.div_ceil(cluster)).unwrap();
        editor.write(at, &l1).unwrap();
        editor
            .free(old.l1_table_offset, l1_bytes.div_ceil(cluster))
            .unwrap();
        let mut header = with_extension(editor.header(), 0x1234, 40);
        header.l1_table_offset = at;
        if editor.set_header(header.clone()).is_err() {
            panic!("cluster {cluster}, bits {bits}");
        }
        editor.commit().unwrap();
        drop(editor);
        let (mut olds, mut news) = (0, 0);
        crashes(&before, &file.journal(), |bytes| {
            let now = meaning(&Header::parse(bytes).unwrap());
            if now == meaning(&old) {
                assert_eq!(opinion(bytes), Checked::Clean, "{cluster} {bits}");
                olds += 1;
            } else {
                assert_eq!(now.l1_table_offset, at);
                assert_eq!(opinion(bytes), Checked::Leaks, "{cluster} {bits}");
                assert_eq!(bytes[run as usize], 0xab);
                news += 1;
            }
        });
        assert!(olds > 3 && news > 0, "{olds} {news}");
        // The run is the only leak, and it can be given back.
        let mut editor = Editor::open(&file, "t").unwrap();
        editor.free(run, 40).unwrap();
        editor.commit().unwrap();
        drop(editor);
        assert_eq!(opinion(&file.bytes()), Checked::Clean);
        let mut driver = Driver::open(file, &OpenOptions::default());
        assert_eq!(driver.read(3 << 20, 5000).unwrap(), [7; 5000]);
    }
}

#[test]
fn an_edit_that_is_dropped_or_fails_changes_nothing() {
    let file = image(&options(4096, 16));
    let before = file.bytes();
    let mut editor = Editor::open(&file, "t").unwrap();
    let at = editor.allocate(3000).unwrap();
    editor.write(at, &[1; 4096]).unwrap();
    drop(editor);
    assert_eq!(file.bytes(), before);
    for writes in 0.. {
        let mut editor = Editor::open(&file, "t").unwrap();
        file.fail_after(Some(writes));
        let done = editor.allocate(5).and_then(|at| {
            editor.write(at, &[1; 4096])?;
            editor.free(at, 5)?;
            editor.commit()
        });
        if done.is_err() {
            assert_eq!(editor.allocate(1).unwrap_err().kind(), ErrorKind::Invalid);
        }
        file.fail_after(None);
        drop(editor);
        assert_eq!(opinion(&file.bytes()), Checked::Clean, "{writes}");
        if done.is_ok() {
            break;
        }
        assert!(writes < 30, "{done:?}");
    }
}

#[test]
fn the_refcount_table_grows() {
    // 64 refcounts in a block, 64 blocks in a cluster of the table.
    let file = image(&options(512, 64));
    let before = Header::read(&file).unwrap();
    let mut editor = Editor::open(&file, "t").unwrap();
    let runs = [5000, 1, 17, 9000].map(|clusters| (editor.allocate(clusters).unwrap(), clusters));
    editor.commit().unwrap();
    let now = Header::read(&file).unwrap();
    assert!(now.refcount_table_clusters > before.refcount_table_clusters + 3);
    assert_eq!(opinion(&file.bytes()), Checked::Leaks);
    // The same editor goes on.
    for (at, clusters) in runs {
        editor.free(at, clusters).unwrap();
    }
    editor.commit().unwrap();
    drop(editor);
    assert_eq!(opinion(&file.bytes()), Checked::Clean);
}

#[test]
fn blocks_that_do_not_fit_memory_are_written_early() {
    let file = image(&options(512, 64));
    let mut editor = Editor::open(&file, "t").unwrap();
    editor.blocks.hold_at_most(8);
    let run = editor.allocate(3000).unwrap();
    editor.adjust(run, 3000, 6).unwrap();
    editor.adjust(run, 3000, -5).unwrap();
    for at in (run..run + 3000 * 512).step_by(512) {
        assert_eq!(editor.refcount(at).unwrap(), 2);
    }
    editor.free(run, 3000).unwrap();
    editor.free(run, 3000).unwrap();
    editor.commit().unwrap();
    drop(editor);
    assert_eq!(opinion(&file.bytes()), Checked::Clean);
}

#[test]
fn what_is_freed_is_not_taken_before_the_commit() {
    let file = image(&options(4096, 16));
    let mut editor = Editor::open(&file, "t").unwrap();
    let a = editor.allocate(4).unwrap();
    editor.commit().unwrap();
    editor.free(a, 4).unwrap();
    let b = editor.allocate(4).unwrap();
    assert!(b + 4 * 4096 <= a || b >= a + 4 * 4096);
    let error = editor.write(a, &[1]).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    drop(editor);

    let mut editor = Editor::open(&file, "t").unwrap();
    editor.free(a, 4).unwrap();
    // Free and taken back in one edit: its content stays.
    file.patch(a as usize, &[9]);
    editor.adjust(a, 1, 1).unwrap();
    editor.commit().unwrap();
    assert_eq!(file.bytes()[a as usize], 9);
    assert_eq!(editor.refcount(a).unwrap(), 1);
    assert_eq!(editor.refcount(a + 4096).unwrap(), 0);
}

#[test]
fn refuses_what_would_break_the_image() {
    let file = image(&options(4096, 2));
    let l1 = Header::read(&file).unwrap().l1_table_offset;
    let before = file.bytes();
    type Step = fn(&mut Editor, u64) -> block::Result<()>;
    let cases: [(&str, Step); 7] = [
        ("refcount_bits of 2 hold 3 at most", |e, l1| {
            e.adjust(l1, 1, 3)
        }),
        ("too low to lower it by 2", |e, l1| e.adjust(l1, 1, -2)),
        ("between two clusters", |e, l1| e.free(l1 + 512, 1)),
        ("end behind 2^56", |e, _| e.free((1 << 56) - 4096, 2)),
        ("which is in use", |e, l1| e.write(l1, &[0])),
        ("refcount width", |e, _| {
            let mut header = e.header().clone();
            header.refcount_order = 3;
            e.set_header(header)
        }),
        ("more than a cluster", |e, _| {
            let header = with_extension(e.header(), 77, 4090);
            e.set_header(header)
        }),
    ];
    for (why, step) in cases {
        let mut editor = Editor::open(&file, "t").unwrap();
        let error = step(&mut editor, l1).unwrap_err().to_string();
        assert!(error.starts_with("t: ") && error.contains(why), "{error}");
        let error = editor.commit().unwrap_err().to_string();
        assert!(error.contains("failed"), "{error}");
        drop(editor);
        assert_eq!(file.bytes(), before);
    }
    for (bit, why) in [(1, "dirty bit"), (2, "marked corrupt")] {
        file.patch(72, &u64::to_be_bytes(bit));
        let error = Editor::open(&file, "t").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let text = error.to_string();
        assert!(
            text.contains(why) && text.contains("diskplane check"),
            "{text}"
        );
    }
    file.patch(72, &[0; 8]);
    let table = Header::read(&file).unwrap().refcount_table_offset as usize;
    file.patch(table, &u64::to_be_bytes(0x1_0200));
    let error = Editor::open(&file, "t").unwrap_err().to_string();
    assert!(error.contains("refcount table: entry 0"), "{error}");
}

#[test]
fn unknown_autoclear_features_are_cleared() {
    let file = image(&options(4096, 16));
    file.patch(88, &u64::to_be_bytes(1 << 9 | 2));
    Editor::open(&file, "t").unwrap().commit().unwrap();
    assert_eq!(file.word(88), 2);
}

#[test]
fn a_header_is_replaced_in_steps_that_may_be_torn() {
    let plain = |cluster: u64| {
        let file = MemFile::default();
        create(&file, &options(cluster, 16)).unwrap();
        Header::parse(&file.bytes()).unwrap()
    };
    let backed = |header: &Header, name: usize| {
        let mut header = header.clone();
        header.backing = Some("n".repeat(name));
        header
    };
    let (p, small) = (plain(65536), plain(1024));
    let bitmaps = with_extension(&p, extensions::BITMAPS, 24);
    let cases = [
        // old, new, whether there is a way in steps
        (p.clone(), bitmaps.clone(), true),
        (bitmaps.clone(), p.clone(), true),
        (
            bitmaps.clone(),
            with_extension(&bitmaps, extensions::BITMAPS, 24),
            true,
        ),
        (bitmaps.clone(), with_extension(&bitmaps, 99, 100), true),
        (backed(&p, 30), backed(&bitmaps, 30), true),
        (backed(&bitmaps, 30), backed(&p, 1000), true),
        (backed(&bitmaps, 1000), backed(&p, 30), true),
        (backed(&bitmaps, 1000), p.clone(), true),
        (
            p.clone(),
            with_extension(&p, extensions::DATA_FILE_NAME, 900),
            true,
        ),
        (
            with_extension(&p, extensions::DATA_FILE_NAME, 900),
            bitmaps.clone(),
            false,
        ),
        (
            backed(&small, 100),
            backed(&with_extension(&small, extensions::BITMAPS, 24), 100),
            true,
        ),
        (
            plain(512),
            with_extension(&meaning(&plain(512)), extensions::BITMAPS, 24),
            true,
        ),
    ];
    let mut rng = Rng(3);
    for (n, (old, mut new, stepwise)) in cases.into_iter().enumerate() {
        new.nb_snapshots = 1;
        new.snapshots_offset = old.cluster_size() * 9;
        let mut disk = old.encode().unwrap();
        // What somebody left there.
        disk.resize(old.cluster_size() as usize, 0);
        let pieces = pieces(&disk, &old, &new).unwrap();
        let (mut olds, mut news) = (0, 0);
        for (at, bytes) in &pieces {
            assert!(
                !stepwise || (bytes.len() == 512) == (*at == 0) || *at != 0,
                "case {n}"
            );
            for _ in 0..20 {
                let mut torn = disk.clone();
                for (i, sector) in bytes.chunks(512).enumerate() {
                    if rng.below(2) == 0 {
                        let at = at + i * 512;
                        torn[at..at + sector.len()].copy_from_slice(sector);
                    }
                }
                if !stepwise {
                    continue;
                }
                let now = meaning(&Header::parse(&torn).unwrap());
                if now == meaning(&old) {
                    olds += 1;
                } else {
                    assert_eq!(now, meaning(&new), "case {n}");
                    news += 1;
                }
            }
            disk[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        assert!(!stepwise || (olds > 0 && news > 0), "case {n}");
        let mut end = Header::parse(&disk).unwrap();
        let mut want = new.clone();
        if old.cluster_size() == 512 {
            (end, want) = (meaning(&end), meaning(&want));
        }
        let kind = |e: &Extension| e.kind;
        end.extensions.sort_by_key(kind);
        want.extensions.sort_by_key(kind);
        assert_eq!(end, want, "case {n}");
    }
}
