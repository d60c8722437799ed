//! Snapshots made, applied and deleted by this code and by qemu-img, in turns.

use super::super::testing::{Change, Checked, Driver, MemFile, Rng, apply as carry, check, run};
use super::super::{CreateOptions, Header, OpenOptions};
use super::{NewSnapshot, apply, create, delete, find, list};
use block::ErrorKind;
use std::fs;
use std::path::PathBuf;

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.into(),
        date_sec: 1_700_000_000,
        date_nsec: 5,
    }
}

/// An image that both this code and QEMU's tools work on.
struct Both {
    dir: tempfile::TempDir,
}

impl Both {
    fn create(options: &str, size: &str) -> Self {
        let both = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let path = both.arg("i");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        run("qemu-img", &[&args[..], &[&path, size]].concat());
        both
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Has `f` work on the file.
    fn ours<T>(&self, f: impl FnOnce(&MemFile) -> T) -> T {
        let file = MemFile::of(fs::read(self.path("i")).unwrap());
        let answer = f(&file);
        fs::write(self.path("i"), file.bytes()).unwrap();
        answer
    }

    fn qemu_img(&self, args: &[&str]) -> String {
        run("qemu-img", &[args, &[&self.arg("i")]].concat())
    }

    fn io(&self, command: &str) {
        run("qemu-io", &["-f", "qcow2", "-c", command, &self.arg("i")]);
    }

    /// The disk (or a snapshot of it) as QEMU reads it.
    fn disk(&self, snapshot: Option<&str>) -> Vec<u8> {
        let raw = self.arg("raw");
        let name = snapshot.map(|s| format!("snapshot.name={s}"));
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        if let Some(name) = &name {
            args.extend(["-l", name]);
        }
        run("qemu-img", &[&args[..], &[&self.arg("i"), &raw]].concat());
        fs::read(raw).unwrap()
    }

    fn is_sound(&self, what: &str) {
        assert_eq!(check(&self.path("i")), Checked::Clean, "{what}");
    }
}

const MIB: u64 = 1 << 20;

/// Kinds of images: options of `qemu-img create`, and most snapshots that the refcounts allow.
const KINDS: [(&str, usize); 8] = [
    ("", 3),
    ("cluster_size=512,refcount_bits=64", 3),
    ("cluster_size=4k,refcount_bits=2", 2),
    ("cluster_size=1k,refcount_bits=4", 3),
    ("compat=0.10,cluster_size=4k", 3),
    ("extended_l2=on,cluster_size=16k", 3),
    ("cluster_size=256k,refcount_bits=8", 3),
    ("cluster_size=4k,compression_type=zstd", 3),
];

#[test]
fn takes_turns_with_qemu() {
    for (nth, (options, most)) in KINDS.into_iter().enumerate() {
        let both = Both::create(options, "4M");
        let mut rng = Rng(nth as u64 + 1);
        let mut disk = vec![0; 4 * MIB as usize];
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        // Compressed clusters share host clusters, which takes larger refcounts, and are whole.
        if !["bits="].iter().any(|o| options.contains(o)) {
            both.io("write -c -P 201 1M 128k");
        }
        for step in 0..7 {
            for _ in 0..2 {
                let at = rng.below(4 * MIB - 70_000) & !511;
                let len = 512 + (rng.below(65_000) & !511);
                let pattern = 1 + rng.below(200) as u8;
                both.io(&match rng.below(3) {
                    0 => format!("write -z -u {at} {len}"),
                    _ => format!("write -P {pattern} {at} {len}"),
                });
            }
            disk.copy_from_slice(&both.disk(None));
            // qemu-img cannot apply where refcounts have reached their limit: it adds before it takes back.
            let full = options.contains("refcount_bits=2");
            let mine = rng.below(3) > 0 || full;
            let which = rng.below(kept.len() as u64) as usize;
            let what = match rng.below(3) {
                _ if kept.len() < most && (kept.is_empty() || step % 3 == 0) => {
                    let name = format!("s{step}");
                    match mine {
                        true => drop(both.ours(|f| create(f, &named(&name)).unwrap())),
                        false => drop(both.qemu_img(&["snapshot", "-c", &name])),
                    }
                    kept.push((name, disk.clone()));
                    "create"
                }
                0 if kept.len() > 1 => {
                    let (name, _) = kept.remove(which);
                    match mine {
                        true => drop(both.ours(|f| delete(f, &name).unwrap())),
                        false => drop(both.qemu_img(&["snapshot", "-d", &name])),
                    }
                    "delete"
                }
                _ => {
                    let (name, then) = &kept[which];
                    match mine {
                        true => drop(both.ours(|f| apply(f, name).unwrap())),
                        false => drop(both.qemu_img(&["snapshot", "-a", name])),
                    }
                    disk.copy_from_slice(then);
                    "apply"
                }
            };
            let what = format!("{options}: step {step}: {what}, ours: {mine}");
            both.is_sound(&what);
            assert!(both.disk(None) == disk, "{what}");
            both.ours(|f| {
                let listed = list(f).unwrap();
                let names: Vec<String> = listed.iter().map(|s| s.shown_name()).collect();
                let want: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
                assert_eq!(names, want, "{what}");
            });
            if step == 6 {
                for (name, then) in &kept {
                    assert!(both.disk(Some(name)) == *then, "{what}: {name}");
                }
            }
        }
        while let Some((name, _)) = kept.pop() {
            both.ours(|f| delete(f, &name).unwrap());
        }
        both.is_sound(options);
        let header = both.ours(|f| Header::read(f).unwrap());
        assert_eq!((header.nb_snapshots, header.snapshots_offset), (0, 0));
    }
}

/// An image with content and a snapshot, in memory.
fn with_snapshot(options: &CreateOptions) -> MemFile {
    let mut driver = Driver::create(options, &OpenOptions::default());
    for at in [0, 100_000, 3 << 20] {
        driver.write(at, &[7; 20_000]).unwrap();
    }
    let file = MemFile::of(driver.close());
    create(&file, &named("one")).unwrap();
    file
}

fn small(refcount_bits: u32) -> CreateOptions {
    CreateOptions {
        size: 4 << 20,
        cluster_size: 4096,
        refcount_bits,
        ..CreateOptions::default()
    }
}

#[test]
fn a_crash_leaves_all_of_an_operation_or_nothing() {
    type Operation = fn(&MemFile);
    let operations: [(&str, Operation); 3] = [
        ("create", |f| drop(create(f, &named("two")).unwrap())),
        ("apply", |f| drop(apply(f, "one").unwrap())),
        ("delete", |f| drop(delete(f, "one").unwrap())),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crashed");
    let mut rng = Rng(9);
    for (what, operation) in operations {
        let file = with_snapshot(&small(16));
        let before = file.bytes();
        file.record();
        operation(&file);
        let headers = [&before, &file.bytes()].map(|b| Header::parse(b).unwrap());
        let (mut durable, mut since) = (before, Vec::new());
        let mut seen = [0, 0];
        for change in file.journal() {
            let sync = matches!(change, Change::Sync);
            since.push(change);
            let mut crashed = durable.clone();
            for change in since.iter().filter(|_| sync || rng.below(2) == 0) {
                carry(&mut crashed, change);
            }
            if sync {
                durable.clone_from(&crashed);
                since.clear();
            }
            let now = Header::parse(&crashed).unwrap();
            let state = headers.iter().position(|h| *h == now);
            seen[state.expect("old or new")] += 1;
            fs::write(&path, &crashed).unwrap();
            assert_eq!(check(&path), Checked::Clean, "{what}");
        }
        assert!(seen[0] > 3 && seen[1] > 0, "{what}: {seen:?}");
    }
}

#[test]
fn names_and_ids_are_found_as_qemu_finds_them() {
    let file = with_snapshot(&small(16));
    for name in ["one", "1", "ü"] {
        create(&file, &named(name)).unwrap();
    }
    let ids = |file: &MemFile| -> Vec<String> {
        list(file).unwrap().iter().map(|s| s.shown_id()).collect()
    };
    assert_eq!(ids(&file), ["1", "2", "3", "4"]);
    let all = list(&file).unwrap();
    assert_eq!(find(&all, "1").unwrap().name, b"one");
    assert_eq!(find(&all, "one").unwrap().id, b"1");
    assert_eq!(find(&all, "ü").unwrap().id, b"4");
    assert_eq!(all[1].date_sec, 1_700_000_000);
    assert_eq!(all[1].disk_size(), Some(4 << 20));
    assert_eq!((all[1].vm_state_size(), all[1].icount()), (0, Some(0)));
    // Deleting goes by name before it goes by id.
    assert_eq!(delete(&file, "1").unwrap().id, b"3");
    assert_eq!(delete(&file, "1").unwrap().id, b"1");
    assert_eq!(ids(&file), ["2", "4"]);
    assert_eq!(create(&file, &named("")).unwrap().id, b"5");
    for error in [delete(&file, "gone"), apply(&file, "gone")] {
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(
            error.to_string().contains("'gone': it has one, ü"),
            "{error}"
        );
    }
}

#[test]
fn refcounts_that_are_too_small_are_refused_before_anything_changes() {
    for (bits, most) in [(1, 0), (2, 2)] {
        let mut driver = Driver::create(&small(bits), &OpenOptions::default());
        driver.write(5000, &[1; 9000]).unwrap();
        let file = MemFile::of(driver.close());
        for n in 0..most {
            create(&file, &named(&n.to_string())).unwrap();
        }
        let before = file.bytes();
        let error = create(&file, &named("x")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let why = format!("refcount_bits of {bits} hold {}", (1 << bits) - 1);
        assert!(error.to_string().contains(&why), "{error}");
        assert_eq!(file.bytes(), before);
        if most > 0 {
            // What is taken back counts before what is added.
            apply(&file, "0").unwrap();
        }
    }
}

#[test]
fn the_vm_state_and_unknown_extra_data_stay() {
    let both = Both::create("cluster_size=4k", "4M");
    both.io("write -P 5 0 64k");
    // A cluster of VM state: behind the disk's end, with an L1 table that reaches there.
    both.ours(|file| {
        create(file, &named("state")).unwrap();
        let mut editor = super::Editor::open(file, "t").unwrap();
        let header = editor.header().clone();
        let data = super::write_bytes(&mut editor, vec![0x77; 4096]).unwrap();
        let l2 = super::write_table(&mut editor, &[data]).unwrap();
        let (mut snapshots, len) = super::table::read(file, &header).unwrap();
        let old = snapshots[0].clone();
        let mut l1 = super::read_l1(&editor, old.l1_offset, old.l1_size).unwrap();
        l1.push(l2);
        super::free_table(&mut editor, old.l1_offset, u64::from(old.l1_size) * 8).unwrap();
        snapshots[0].l1_offset = super::write_table(&mut editor, &l1).unwrap();
        snapshots[0].l1_size += 1;
        snapshots[0].vm_state_size_32 = 4096;
        snapshots[0].extra[..8].copy_from_slice(&4096u64.to_be_bytes());
        snapshots[0].extra.extend_from_slice(&[0xee; 100]);
        let table = super::table::encode(&snapshots, 0).unwrap();
        super::free_table(&mut editor, header.snapshots_offset, len).unwrap();
        let mut header = header;
        header.snapshots_offset = super::write_bytes(&mut editor, table).unwrap();
        editor.set_header(header).unwrap();
        editor.commit().unwrap();
    });
    both.is_sound("made");
    both.io("write -P 6 0 64k");
    both.ours(|file| {
        create(file, &named("other")).unwrap();
        let applied = apply(file, "state").unwrap();
        assert_eq!(applied.vm_state_size(), 4096);
        assert_eq!(applied.extra[24..], [0xee; 100]);
        // The active L1 table reaches there too now, and what a writer does leaves it alone.
        let header = Header::read(file).unwrap();
        assert_eq!(header.l1_size, applied.l1_size);
        delete(file, "state").unwrap();
        let again = create(file, &named("again")).unwrap();
        assert_eq!(again.l1_size, applied.l1_size);
        let l1 = super::super::close::read_short(file, again.l1_offset, 8 * again.l1_size as usize);
        let l2 = super::super::read_u64(&l1.unwrap(), 8 * (again.l1_size as usize - 1)).unwrap();
        let data = file.word(l2);
        assert_eq!(file.bytes()[data as usize..][..4096], [0x77; 4096]);
    });
    both.is_sound("done");
    both.io("read -P 5 0 64k");
}

#[test]
fn a_snapshot_of_another_size_is_applied() {
    let both = Both::create("cluster_size=4k", "4M");
    both.io("write -P 5 3M 64k");
    both.ours(|file| create(file, &named("small")).unwrap());
    let path = both.arg("i");
    let then = both.disk(None);
    for size in ["8M", "2M"] {
        run("qemu-img", &["resize", "-q", "--shrink", &path, size]);
        both.ours(|file| {
            apply(file, "small").unwrap();
            assert_eq!(Header::read(file).unwrap().size, 4 << 20);
        });
        both.is_sound(size);
        assert!(both.disk(None) == then, "{size}");
    }
}

#[test]
fn refuses_what_qemu_refuses() {
    let both = Both::create("", "4M");
    let path = both.arg("i");
    run("qemu-img", &["bitmap", "--add", &path, "b"]);
    both.ours(|file| {
        create(file, &named("one")).unwrap();
        let error = apply(file, "one").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("bitmaps"), "{error}");
        delete(file, "one").unwrap();
        let error = create(file, &named(&"n".repeat(256))).unwrap_err();
        assert!(error.to_string().contains("the most are 255"), "{error}");
        assert!(create(file, &named("a\0b")).is_err());
    });
    both.is_sound("bitmaps");
    assert!(both.qemu_img(&["info"]).contains("name: b"));

    let both = Both::create("data_file_raw=off", "4M");
    let data = format!("data_file={}", both.arg("data"));
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &data,
            &both.arg("i"),
            "4M",
        ],
    );
    both.ours(|file| {
        let error = create(file, &named("one")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("external file"), "{error}");
    });
}

#[test]
fn damaged_tables_are_refused_and_left_alone() {
    let file = with_snapshot(&small(16));
    let header = Header::read(&file).unwrap();
    let l1 = header.l1_table_offset;
    let l2 = file.word(l1) & !(1 << 63);
    type Damage = (u64, u64, &'static str);
    let cases: [Damage; 5] = [
        (l1, l2 + 512, "L1 entry 0"),
        (l1, 1 << 40, "behind the end of the file"),
        (l2, 0x1234 << 9, "entry 0 points between clusters"),
        (l2, 0x0100_0000_0000_0000, "reserved bits"),
        (l2, 1 << 30 << 12, "too low"),
    ];
    for (at, raw, why) in cases {
        let bytes = file.bytes();
        file.patch(at as usize, &raw.to_be_bytes());
        let damaged = file.bytes();
        let error = match why {
            // Counting up a cluster that is nowhere works; counting it down does not.
            "too low" => delete(&file, "one").unwrap_err(),
            _ => create(&file, &named("two")).unwrap_err(),
        };
        let text = error.to_string();
        assert!(
            text.starts_with("test.qcow2: ") && text.contains(why),
            "{text}"
        );
        assert!(text.contains("diskplane check"), "{text}");
        assert_eq!(text.matches("test.qcow2").count(), 1, "{text}");
        assert_eq!(file.bytes(), damaged);
        file.patch(0, &bytes);
    }
}
