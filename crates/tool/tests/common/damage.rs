//! Damage to an image's metadata, by seeded rules.

use super::Rng;
use image::qcow2::check::{Layout, SNAPSHOT_BYTES, Snapshot, each_refcount, set_refcount};
use image::qcow2::{Header, extensions, features};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// A piece of metadata: what it is, first byte, bytes.
pub type Place = (&'static str, u64, u64);

fn word(bytes: &[u8], at: u64) -> u64 {
    let field = bytes.get(at as usize..).and_then(<[u8]>::first_chunk);
    field.map_or(0, |field| u64::from_be_bytes(*field))
}

fn put(bytes: &mut [u8], at: u64, new: &[u8]) {
    if let Some(field) = bytes.get_mut(at as usize..at as usize + new.len()) {
        field.copy_from_slice(new);
    }
}

/// Where each snapshot's entry is, and what it says.
fn snapshots(bytes: &[u8], header: &Header) -> Vec<(u64, Snapshot)> {
    let mut found = Vec::new();
    let mut at = header.snapshots_offset;
    for _ in 0..header.nb_snapshots.min(1000) {
        at = at.next_multiple_of(8);
        let fixed = bytes.get(at as usize..at as usize + SNAPSHOT_BYTES);
        let Some(snapshot) = fixed.and_then(Snapshot::parse) else {
            break;
        };
        found.push((at, snapshot));
        at += snapshot.len();
    }
    found
}

/// Where an image's metadata are.
pub fn places(bytes: &[u8]) -> Vec<Place> {
    let header = Header::parse(bytes).expect("a header");
    let layout = Layout::of(&header);
    let cluster = layout.cluster();
    let table = u64::from(header.refcount_table_clusters) * cluster;
    let mut places = vec![
        (
            "L1 table",
            header.l1_table_offset,
            u64::from(header.l1_size) * 8,
        ),
        (
            "refcount table",
            header.refcount_table_offset,
            64.min(table),
        ),
    ];
    let mut l1s = vec![(header.l1_table_offset, header.l1_size)];
    let snapshots = snapshots(bytes, &header);
    if let (Some((first, _)), Some((last, end))) = (snapshots.first(), snapshots.last()) {
        places.push(("snapshot table", *first, last + end.len() - first));
    }
    for (_, snapshot) in snapshots {
        let (at, size) = (snapshot.l1_offset, snapshot.l1_size.min(1 << 16));
        places.push(("snapshot's L1 table", at, u64::from(size) * 8));
        l1s.push((at, size));
    }
    for (at, size) in l1s {
        for index in 0..u64::from(size) {
            match word(bytes, at + index * 8) & OFFSET {
                0 => {}
                table => places.push(("L2 table", table, cluster)),
            }
        }
    }
    for index in 0..table.min(1 << 16) / 8 {
        match word(bytes, header.refcount_table_offset + index * 8) {
            0 => {}
            block => places.push(("refcount block", block, cluster)),
        }
    }
    if let Some(bitmaps) = header.extension(extensions::BITMAPS)
        && header.autoclear & features::BITMAPS != 0
    {
        let (len, mut at) = (word(bitmaps, 8), word(bitmaps, 16));
        places.push(("bitmap directory", at, len));
        let end = at + len.min(1 << 16);
        while at < end {
            let size = word(bytes, at + 8) >> 32;
            places.push(("bitmap table", word(bytes, at), size.min(1 << 16) * 8));
            let (name, extra) = (
                word(bytes, at + 16) >> 32 & 0xffff,
                word(bytes, at + 20) >> 32,
            );
            at = (at + 24 + name + extra).next_multiple_of(8);
        }
    }
    places
        .retain(|(_, at, len)| *len > 0 && at.saturating_add(*len) <= bytes.len() as u64 + cluster);
    places
}

/// Damages a word of metadata of one kind in one place, and says how.
pub fn damage_of(bytes: &mut [u8], rng: &mut Rng, kind: &str) -> String {
    let places = places(bytes);
    let of_kind: Vec<Place> = places.iter().copied().filter(|p| p.0 == kind).collect();
    match of_kind.get(rng.below(of_kind.len() as u64) as usize) {
        Some(place) => word_of(bytes, rng, *place, &places),
        None => format!("no {kind}"),
    }
}

fn word_of(bytes: &mut [u8], rng: &mut Rng, place: Place, all: &[Place]) -> String {
    let (kind, start, len) = place;
    let words = (len / 8).max(1);
    let pick = |rng: &mut Rng| {
        let mut at = start + rng.below(words) * 8;
        // Mostly an entry that is in use.
        for _ in 0..200 {
            if word(bytes, at) != 0 || at + 8 > bytes.len() as u64 {
                break;
            }
            at = start + rng.below(words) * 8;
        }
        at
    };
    let at = pick(rng);
    if at + 8 > bytes.len() as u64 {
        return format!("nothing at {at:#x}");
    }
    let old = word(bytes, at);
    let another = word(bytes, pick(rng));
    let cluster = Layout::of(&Header::parse(bytes).expect("a header")).cluster();
    let clusters = bytes.len() as u64 / cluster;
    let flags = old & !OFFSET;
    let new = match rng.below(14) {
        0 => 0,
        1 => old ^ COPIED,
        2 => flags | (rng.below(clusters + 2) * cluster),
        3 => flags | (all[rng.below(all.len() as u64) as usize].1 / cluster * cluster),
        4 => flags | ((clusters + [0, 1, 2, 100, 1 << 20][rng.below(5) as usize]) * cluster),
        5 => old + 512 * (1 + rng.below(cluster / 512)),
        6 => another,
        7 => old ^ (1 << [1, 2, 5, 8, 56, 58, 61][rng.below(7) as usize]),
        8 => old ^ 1,
        9 => old ^ COMPRESSED,
        10 => COMPRESSED | rng.below(4) << 54 | rng.below(bytes.len() as u64 + cluster),
        // In the bitmap of an entry with subclusters: both allocated and zeros.
        11 => old | old << 32 | old >> 32,
        12 => rng.next(),
        _ => old ^ 1 << rng.below(64),
    };
    put(bytes, at, &new.to_be_bytes());
    format!("{kind} at {start:#x}: word at {at:#x} from {old:#x} to {new:#x}")
}

/// A refcount of a cluster that has one, or of any.
fn refcount(bytes: &mut [u8], rng: &mut Rng, all: &[Place]) -> Option<String> {
    let layout = Layout::of(&Header::parse(bytes).ok()?);
    let blocks: Vec<&Place> = all.iter().filter(|p| p.0 == "refcount block").collect();
    let (_, at, _) = **blocks.get(rng.below(blocks.len() as u64) as usize)?;
    let block = bytes.get_mut(at as usize..(at + layout.cluster()) as usize)?;
    let mut used = Vec::new();
    let entries = 1 << layout.block_bits();
    each_refcount(layout.refcount_order, block, entries, |index, value| {
        used.push((index, value))
    });
    let past = used.last().map_or(0, |last| last.0 + 1 + rng.below(3));
    let (index, old) = match rng.below(5) {
        0 => (past.min(entries - 1), 0),
        _ => *used.get(rng.below(used.len() as u64) as usize)?,
    };
    let max = layout.refcount_max();
    let new = match rng.below(5) {
        0 => 0,
        1 => max,
        2 => old.saturating_sub(1),
        3 => rng.next() & max,
        _ => old.saturating_add(1).min(max),
    };
    set_refcount(&layout, block, index, new);
    Some(format!(
        "refcount block at {at:#x}: refcount {index} from {old} to {new}"
    ))
}

fn field(bytes: &mut [u8], rng: &mut Rng, all: &[Place]) -> Option<String> {
    let header = Header::parse(bytes).ok()?;
    let cluster = Layout::of(&header).cluster();
    let v3 = header.version >= 3;
    let fields = [
        ("l1_size", 36, 4),
        ("l1_table_offset", 40, 8),
        ("refcount_table_offset", 48, 8),
        ("refcount_table_clusters", 56, 4),
        ("nb_snapshots", 60, 4),
        ("snapshots_offset", 64, 8),
        ("size", 24, 8),
        ("incompatible_features", 72, 8),
        ("autoclear_features", 88, 8),
    ];
    let (name, at, len) = fields[rng.below(if v3 { 9 } else { 7 }) as usize];
    let old = word(bytes, at) >> (64 - 8 * len);
    let somewhere = all[rng.below(all.len() as u64) as usize].1 / cluster * cluster;
    let new = match (name, rng.below(6)) {
        ("incompatible_features", how) => old ^ (1 << (how & 1)),
        ("autoclear_features", _) => old ^ 1,
        ("size", how) => old + cluster * how / 2,
        (_, 0) => 0,
        (_, 1) => old + 1,
        (_, 2) => old.saturating_sub(1),
        (_, 3) if len == 8 => somewhere,
        (_, 4) if len == 8 => bytes.len() as u64 / cluster * cluster + cluster * rng.below(3),
        (_, 5) if len == 8 => old + 512 * (1 + rng.below(cluster / 512)),
        _ => old ^ (1 << rng.below(8 * len)),
    };
    put(bytes, at, &new.to_be_bytes()[8 - len as usize..]);
    Some(format!("header: {name} from {old:#x} to {new:#x}"))
}

/// A field of one of the tables that have some.
fn record(bytes: &mut [u8], rng: &mut Rng, all: &[Place]) -> Option<String> {
    let header = Header::parse(bytes).ok()?;
    let cluster = Layout::of(&header).cluster();
    let snapshots = snapshots(bytes, &header);
    let directory = all.iter().find(|place| place.0 == "bitmap directory");
    let (base, fields): (u64, &[(&str, u64, u64)]) = match directory {
        Some(place) if snapshots.is_empty() || rng.below(2) == 0 => (
            place.1,
            &[
                ("bitmap's table offset", 0, 8),
                ("bitmap's table size", 8, 4),
                ("bitmap's flags", 12, 4),
                ("bitmap's type", 16, 1),
                ("bitmap's granularity", 17, 1),
                ("bitmap's name length", 18, 2),
                ("bitmap's extra data length", 20, 4),
            ],
        ),
        _ => (
            snapshots.get(rng.below(snapshots.len() as u64) as usize)?.0,
            &[
                ("snapshot's L1 offset", 0, 8),
                ("snapshot's L1 size", 8, 4),
                ("snapshot's id length", 12, 2),
                ("snapshot's name length", 14, 2),
                ("snapshot's VM state size", 32, 4),
                ("snapshot's extra data length", 36, 4),
            ],
        ),
    };
    let (name, at, len) = fields[rng.below(fields.len() as u64) as usize];
    let at = base + at;
    let old = word(bytes, at) >> (64 - 8 * len);
    let somewhere = all[rng.below(all.len() as u64) as usize].1 / cluster * cluster;
    let new = match rng.below(6) {
        0 => 0,
        1 => old + 1,
        2 => old.saturating_sub(1),
        3 if len == 8 => somewhere,
        4 if len == 8 => bytes.len() as u64 / cluster * cluster + cluster * rng.below(3),
        5 if len > 1 => old + 8 * (1 + rng.below(200)),
        _ => old ^ (1 << rng.below(8 * len)),
    };
    put(bytes, at, &new.to_be_bytes()[8 - len as usize..]);
    Some(format!("{name} at {at:#x} from {old:#x} to {new:#x}"))
}

/// Cuts the file, or lets it go on.
fn length(bytes: &mut Vec<u8>, rng: &mut Rng) -> Option<String> {
    let cluster = Layout::of(&Header::parse(bytes).ok()?).cluster();
    let old = bytes.len() as u64;
    let by = rng.below(3 * cluster) + 1;
    let new = match rng.below(6) {
        0 => rng.below(old),
        1 => old + by,
        2 => old + by.next_multiple_of(cluster),
        3 => old.saturating_sub(by.next_multiple_of(cluster)),
        _ => old.saturating_sub(by),
    };
    bytes.resize((new as usize).max(1024), 0);
    Some(format!("{old:#x} bytes become {new:#x}"))
}

/// Damages an image in one way, and says how; `None` when it is past that.
pub fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) -> Option<String> {
    Header::parse(bytes).ok()?;
    let all = places(bytes);
    match rng.below(20) {
        0..4 => refcount(bytes, rng, &all),
        4 => length(bytes, rng),
        5 => field(bytes, rng, &all),
        6 | 7 => record(bytes, rng, &all),
        _ => {
            // As often an L1 as an L2 table, however many there are of each.
            let mut kinds: Vec<&str> = all.iter().map(|p| p.0).collect();
            kinds.sort_unstable();
            kinds.dedup();
            let kind = kinds[rng.below(kinds.len() as u64) as usize];
            Some(damage_of(bytes, rng, kind))
        }
    }
}
