//! Our opinion and QEMU's, on images that QEMU made and we damaged.
//!
//! `CHECK_ROUNDS` is how many damaged images of each kind are tried, `CHECK_SEED` the first seed,
//! `CHECK_KIND` part of a kind's name: scripts/soak/check.sh uses them. A complaint names its kind and seed.

use crate::common;

use common::kinds::named;
use common::{
    KINDS, Kind, Rng, Verdict, check_with, damage, damage_of, make, open, qemu_check,
    qemu_check_of, reader, verdict,
};
use std::fs;
use std::path::Path;
use std::process::Command;
use testkit::TempDir;
use tool::check::Repair;

/// Damaged images of each kind.
const ROUNDS: u64 = 1;

fn wish(name: &str, default: u64) -> u64 {
    let wish = std::env::var(name).ok();
    wish.and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// A verdict for people: the messages that are not one of thousands.
fn shown(verdict: &Verdict) -> String {
    const MANY: [&str; 6] = [
        "Leaked cl",
        "ERROR clu",
        "Repairing clu",
        "ERROR OFL",
        "Repairing OFL",
        "Can't get",
    ];
    let lines = verdict.messages.lines();
    let lines = lines.filter(|line| !MANY.iter().any(|many| line.starts_with(many)));
    let messages: Vec<&str> = lines.take(6).collect();
    format!("{:?} {}", without_messages(verdict), messages.join(" | "))
}

fn without_messages(verdict: &Verdict) -> Verdict {
    Verdict {
        messages: String::new(),
        ..verdict.clone()
    }
}

/// Our verdict, and whether clusters are used by two things.
fn ours(path: &Path, repair: Repair) -> Result<(Verdict, bool), String> {
    let file = open(path);
    check_with(&*file, repair)
        .map(|report| (verdict(&report), report.overlaps > 0))
        .map_err(|error| error.to_string())
}

#[test]
fn sound_images_are_sound() {
    let dir = TempDir::new();
    for kind in KINDS {
        let image = make(&dir, kind, 1);
        let theirs = qemu_check_of(kind, &image, "").expect("qemu-img ends");
        assert_eq!(theirs.status, 0, "{}: {}", kind.name, theirs.messages);
        assert_eq!(
            ours(&image, Repair::No),
            Ok((without_messages(&theirs), false)),
            "{}",
            kind.name
        );
        // Nothing to repair, nothing changed.
        let before = fs::read(&image).expect("reads");
        for repair in [Repair::Leaks, Repair::All] {
            assert_eq!(
                ours(&image, repair),
                Ok((without_messages(&theirs), false)),
                "{}",
                kind.name
            );
        }
        assert!(before == fs::read(&image).expect("reads"), "{}", kind.name);
        let states = reader::states(&before);
        assert_eq!(states.len() as u32, 1 + kind.snapshots, "{}", kind.name);
        assert!(
            states.values().all(|state| !state.is_empty()),
            "{}",
            kind.name
        );
    }
}

/// A difference: what kind of, and all about it.
type Complaint = (&'static str, String);

/// One damaged image: what we say of it, and what becomes of it. Complaints go to `out`.
fn one(dir: &TempDir, kind: &Kind, sound: &[u8], seed: u64, out: &mut Vec<Complaint>) {
    let mut rng = Rng::new(seed);
    let mut bytes = sound.to_vec();
    let mut how = Vec::new();
    for _ in 0..1 + rng.below(3) * rng.below(2) {
        how.extend(damage(&mut bytes, &mut rng));
    }
    let what = format!("{}, seed {seed}: {}", kind.name, how.join("; "));
    let (mine, their) = (dir.path("ours.qcow2"), dir.path("theirs.qcow2"));
    fs::write(&mine, &bytes).expect("writes");
    fs::write(&their, &bytes).expect("writes");
    let said = ours(&mine, Repair::No);
    if bytes != fs::read(&mine).expect("reads") {
        out.push(("wrote", format!("{what}: a check wrote")));
    }
    let Some(theirs) = qemu_check_of(kind, &their, "") else {
        out.push(("qemu crashed", what));
        return;
    };
    // Without facts it did not open the image, or gave up.
    let opened = theirs.facts != [0; 5];
    match &said {
        Ok((verdict, _)) if opened && verdict != &without_messages(&theirs) => {
            out.push((
                "verdict",
                format!("{what}:\n  we {verdict:?}\n  qemu {}", shown(&theirs)),
            ));
        }
        Ok((verdict, _)) if !opened && verdict.status != 1 => {
            let text = format!("{what}:\n  we {verdict:?}\n  qemu: {}", theirs.messages);
            out.push(("only qemu refuses", text));
        }
        Err(error) if opened => {
            out.push((
                "only we refuse",
                format!("{what}:\n  we fail: {error}\n  qemu {}", shown(&theirs)),
            ));
        }
        _ => {}
    }
    // Both only if there is time.
    let both = wish("CHECK_ROUNDS", 0) > 0;
    for (name, repair) in [("leaks", Repair::Leaks), ("all", Repair::All)] {
        if !both && (repair == Repair::Leaks) != seed.is_multiple_of(3) {
            continue;
        }
        fs::write(&mine, &bytes).expect("writes");
        fs::write(&their, &bytes).expect("writes");
        let said = ours(&mine, repair);
        let theirs = qemu_check_of(kind, &their, name);
        repaired(
            kind,
            &format!("{what}: -r {name}"),
            [&mine, &their],
            &bytes,
            said,
            theirs,
            out,
        );
    }
}

fn repaired(
    kind: &Kind,
    what: &str,
    [mine, their]: [&Path; 2],
    before: &[u8],
    said: Result<(Verdict, bool), String>,
    theirs: Option<Verdict>,
    out: &mut Vec<Complaint>,
) {
    let Some(after) = qemu_check_of(kind, mine, "") else {
        out.push(("qemu crashed on ours", what.into()));
        return;
    };
    let (Some(theirs), Some(their_after)) = (theirs, qemu_check_of(kind, their, "")) else {
        // It may run out of memory: to "repair" a refcount block behind the file's end it grows the file.
        return;
    };
    let about = || {
        format!(
            "{what}\n  we {said:?}\n  qemu {}\n  after ours {}\n  after qemu's {}",
            shown(&theirs),
            shown(&after),
            shown(&their_after)
        )
    };
    let left = |v: &Verdict| (v.status, v.corruptions, v.leaks, v.check_errors);
    let reading = differs(&theirs, what);
    match &said {
        Ok((said, _)) => {
            let same = left(said) == left(&after) && said.facts == after.facts;
            if after.facts != [0; 5] && !same {
                out.push(("we say what is not", about()));
            }
            let fixed = |v: &Verdict| (v.corruptions_fixed, v.leaks_fixed);
            // What it cuts off a snapshot table it counts by what it then takes for entries.
            let cut = theirs.messages.contains("Discarding");
            if left(&after) != left(&their_after) || reading.is_some() || cut {
                // What was repaired differs too.
            } else if theirs.facts != [0; 5] && fixed(said) != fixed(&theirs) {
                out.push(("counts of repairs", about()));
            } else if said.status != theirs.status {
                out.push(("exit code of a repair", about()));
            }
        }
        Err(_) if theirs.facts != [0; 5] => out.push(("only we refuse to repair", about())),
        Err(_) => {}
    }
    if reading.is_none() && worse(&after, &their_after) {
        out.push(("worse", about()));
    }
    let read = |path: &Path| fs::read(path).expect("reads");
    let large = |path: &Path| fs::metadata(path).is_ok_and(|m| m.len() > 1 << 28);
    if !large(mine) && !large(their) {
        let lost = reader::lost(before, &read(mine), &read(their));
        if !lost.is_empty() {
            let some: Vec<String> = lost.into_iter().take(3).collect();
            out.push(("lost", format!("{}\n  {}", about(), some.join("\n  "))));
        }
    }
}

/// Why QEMU's repair is not to be compared with.
fn differs(theirs: &Verdict, what: &str) -> Option<&'static str> {
    let says = |text: &str| theirs.messages.contains(text);
    if theirs.status == 1 && theirs.facts == [0; 5] {
        // What it had begun stays.
        Some("it gave up")
    } else if says("Table is not cluster aligned") || says("l2 entry with reserved bits set") {
        Some("it takes somebody's data for a table, and writes into them")
    } else if says("Marking image as corrupt") {
        Some("it stopped in the middle")
    } else if what.starts_with("everything") {
        Some("it loses all snapshots when it opens an image with bitmaps for writing")
    } else {
        None
    }
}

/// Whether a repair left more wrong than another.
fn worse(a: &Verdict, b: &Verdict) -> bool {
    let rank = |v: &Verdict| [0, 3, 2, 1].iter().position(|status| *status == v.status);
    // What is not checked (1) has no counts.
    rank(a) > rank(b)
        || b.status != 1 && a.corruptions > b.corruptions
        || matches!(b.status, 0 | 3) && a.leaks > b.leaks
}

#[test]
fn damaged_images_are_judged_and_repaired_as_by_qemu() {
    let dir = TempDir::new();
    let mut complaints = Vec::new();
    let wanted = std::env::var("CHECK_KIND").unwrap_or_default();
    for (nth, kind) in KINDS.iter().enumerate() {
        if !kind.name.contains(&wanted) {
            continue;
        }
        let image = make(&dir, kind, 7);
        let sound = fs::read(&image).expect("reads");
        let first = nth as u64 * 1_000_000 + wish("CHECK_SEED", 0);
        for seed in first..first + wish("CHECK_ROUNDS", ROUNDS) {
            let told = complaints.len();
            one(&dir, kind, &sound, seed, &mut complaints);
            for (class, text) in complaints.iter().skip(told) {
                println!("[{class}] {text}");
            }
        }
    }
    let mut classes: Vec<&str> = complaints.iter().map(|c| c.0).collect();
    classes.sort_unstable();
    let counts = classes.chunk_by(|a, b| a == b);
    let counts: Vec<_> = counts.map(|c| format!("{} × {}", c.len(), c[0])).collect();
    assert!(complaints.is_empty(), "{}", counts.join(", "));
}

#[test]
fn a_repair_keeps_snapshots_and_bitmaps() {
    let dir = TempDir::new();
    let both = KINDS.iter().find(|k| k.snapshots > 0 && k.bitmaps > 0);
    let kind = both.expect("a kind with both");
    let image = make(&dir, kind, 3);
    let sound = fs::read(&image).expect("reads");
    let list = |what: &str| {
        let mut info = Command::new("qemu-img");
        let output = info.arg("info").args(named(kind, &image)).output();
        let text = String::from_utf8_lossy(&output.expect("qemu-img runs").stdout).into_owned();
        text.matches(what).count()
    };
    let before = (list("snapshot"), list("name: bitmap"));
    assert!(before.0 >= 2 && before.1 == 2, "{before:?}");
    for seed in 0..20 {
        let mut bytes = sound.clone();
        let how = damage_of(&mut bytes, &mut Rng::new(seed), "refcount block");
        fs::write(&image, &bytes).expect("writes");
        let (verdict, _) = ours(&image, Repair::All).expect("repairs");
        assert_eq!(verdict.status, 0, "seed {seed}: {how}");
        assert_eq!((list("snapshot"), list("name: bitmap")), before, "{how}");
        assert_eq!(qemu_check(&image, "").expect("ends").status, 0, "{how}");
    }
}
