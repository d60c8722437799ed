//! What can be read of an image, without trusting it: for telling what a repair lost.

use image::qcow2::Header;
use image::qcow2::check::{Layout, SNAPSHOT_BYTES, Snapshot, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

/// What a guest cluster reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Host data with this hash: of what is stored, and of the subclusters' bitmap.
    Data(u64),
    /// Zeros without data, by entry and bitmap.
    Zeros(u64),
    /// Nothing sensible.
    Lost,
}

/// What a state of a disk reads as: by guest cluster, only those with an entry.
pub type State = BTreeMap<u64, Value>;

/// A file, and which of its clusters are metadata.
struct Bytes<'a> {
    bytes: &'a [u8],
    tables: BTreeSet<u64>,
}

fn word(bytes: &[u8], at: u64) -> Option<u64> {
    let field = bytes.get(usize::try_from(at).ok()?..)?.first_chunk()?;
    Some(u64::from_be_bytes(*field))
}

/// The active state and those of the snapshots, by id and name.
pub fn states(bytes: &[u8]) -> BTreeMap<Vec<u8>, State> {
    let mut found = BTreeMap::new();
    let Ok(header) = Header::parse(bytes) else {
        return found;
    };
    let layout = Layout::of(&header);
    // What lies there is no guest's, whatever an entry says.
    let tables = super::damage::places(bytes).into_iter();
    let tables: BTreeSet<u64> = tables
        .flat_map(|(_, at, len)| at >> layout.cluster_bits..=(at + len - 1) >> layout.cluster_bits)
        .collect();
    let bytes = &Bytes { bytes, tables };
    let active = state(bytes, &layout, header.l1_table_offset, header.l1_size);
    found.insert(b"active".to_vec(), active);
    let mut at = header.snapshots_offset;
    for _ in 0..header.nb_snapshots.min(100) {
        at = at.next_multiple_of(8);
        let part = |from: u64, len: u64| {
            let from = usize::try_from(from).ok()?;
            bytes
                .bytes
                .get(from..from.checked_add(usize::try_from(len).ok()?)?)
        };
        let Some(snapshot) = part(at, SNAPSHOT_BYTES as u64).and_then(Snapshot::parse) else {
            break;
        };
        let strings = u64::from(snapshot.id_len) + u64::from(snapshot.name_len);
        let name = part(at + snapshot.len() - strings, strings).unwrap_or_default();
        at += snapshot.len();
        if snapshot.len() > 512 {
            // Its name is whatever lies behind the table.
            continue;
        }
        let size = snapshot.l1_size.min(1 << 16);
        found.insert(
            name.to_vec(),
            state(bytes, &layout, snapshot.l1_offset, size),
        );
    }
    found
}

fn state(file: &Bytes, layout: &Layout, l1: u64, size: u32) -> State {
    let bytes = file.bytes;
    let mut state = State::new();
    let entries = layout.cluster() / 8 / layout.entry_words() as u64;
    for index in 0..u64::from(size) {
        let Some(entry) = word(bytes, l1 + index * 8).and_then(|raw| layout.l1_entry(raw)) else {
            continue;
        };
        if entry.table == 0 {
            continue;
        }
        let lost = !entry.faults.none() || word(bytes, entry.table).is_none();
        for nth in 0..entries {
            let at = entry.table + nth * 8 * layout.entry_words() as u64;
            let raw = word(bytes, at).unwrap_or(0);
            let bitmap = match layout.extended {
                true => word(bytes, at + 8).unwrap_or(0),
                false => 0,
            };
            if !lost && raw | bitmap == 0 {
                continue;
            }
            let value = match lost {
                true => Value::Lost,
                false => value(file, layout, raw, bitmap),
            };
            state.insert(index * entries + nth, value);
        }
    }
    state
}

fn value(file: &Bytes, layout: &Layout, raw: u64, bitmap: u64) -> Value {
    let entry = layout.l2_entry(raw, bitmap);
    let zeros = bitmap >> 32 | (raw & 1 & u64::from(!layout.extended)) << 32;
    let part = |at: u64, len: u64| {
        let at = usize::try_from(at).ok()?;
        let there = file.bytes.get(at..)?;
        Some(there.get(..len as usize).unwrap_or(there))
    };
    let hash = |data: &[u8]| {
        if data.is_empty() {
            return Value::Lost;
        }
        // A file may get longer by zeros.
        let data = data.get(
            ..data
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |at| at + 1),
        );
        let mut hasher = DefaultHasher::new();
        (data, bitmap).hash(&mut hasher);
        Value::Data(hasher.finish())
    };
    match entry.target {
        _ if !entry.faults.none() => Value::Lost,
        Target::Cluster { offset, .. } | Target::Compressed { offset, .. }
            if !layout.data_file && file.tables.contains(&(offset >> layout.cluster_bits)) =>
        {
            Value::Lost
        }
        Target::Nothing => Value::Zeros(zeros),
        // Where it is in the other file is all there is to keep.
        Target::Cluster { offset, .. } if layout.data_file => hash(&offset.to_be_bytes()),
        Target::Cluster { .. } if zeros == 1 << 32 => Value::Zeros(zeros),
        Target::Cluster { offset, .. } => part(offset, layout.cluster()).map_or(Value::Lost, hash),
        // Nobody knows where in the last sector they end.
        Target::Compressed { offset, len } => {
            part(offset, len.saturating_sub(511).max(1)).map_or(Value::Lost, hash)
        }
        Target::Refused => Value::Lost,
    }
}

/// What was in an image before a repair, is in `theirs` still, and not in `ours`.
pub fn lost(before: &[u8], ours: &[u8], theirs: &[u8]) -> Vec<String> {
    let (before, ours, theirs) = (states(before), states(ours), states(theirs));
    let mut lost = Vec::new();
    for (name, was) in before {
        let Some(their) = theirs.get(&name) else {
            continue;
        };
        let shown = String::from_utf8_lossy(&name).into_owned();
        let Some(our) = ours.get(&name) else {
            lost.push(format!("all of {shown}"));
            continue;
        };
        for (cluster, value) in was {
            let kept = their.get(&cluster) == Some(&value);
            if value != Value::Lost && kept && our.get(&cluster) != Some(&value) {
                lost.push(format!(
                    "{shown}: cluster {cluster}: {:?} was {value:?}",
                    our.get(&cluster)
                ));
            }
        }
    }
    lost
}
