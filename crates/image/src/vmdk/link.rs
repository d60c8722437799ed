//! Another parent, or nothing above it: what commit and rebase change of an image that nobody uses.
//!
//! What says which image is the parent is in two lines of the descriptor, which come to lie in one sector, so that one write
//! changes both:
//!
//! ```text
//!   sector 0   # Disk DescriptorFile … CID= parentCID= parentFileNameHint="" … blank lines
//!   sector 1   what does not fit in there any more: written before, and nobody reads it before sector 0 leads to it
//! ```
//!
//! A descriptor that has several sectors already stays where it is: the lines change within theirs, where blank lines and
//! comments make room.
//!
//! An image is emptied entry by entry: what each led to the parent has by then.

use super::descriptor::{Descriptor, NO_PARENT};
use super::header::SECTOR;
use super::open::{Parts, Tables, hosted_to_write};
use crate::FileId;
use crate::metadata::read_short;
use block::{Context, Error, Result, Storage, limits};

/// Bytes of a sector.
const LEN: usize = SECTOR as usize;

/// Makes `parent`, its name and its CID, the parent of the image whose first file is `file`, and which nobody else may use;
/// `None`: it gets none.
///
/// # Errors
///
/// `Invalid` for a name that a descriptor cannot have; `Unsupported` where the descriptor has no room for it; as
/// [`Parts::read`], and what the host fails with. The image has its old parent then.
pub fn set_parent(file: &dyn Storage, parent: Option<(&str, u32)>) -> Result<()> {
    change(file, parent).context(|| file.name())
}

fn change(file: &dyn Storage, parent: Option<(&str, u32)>) -> Result<()> {
    if let Some((name, _)) = parent {
        let most = limits::FILE_NAME_BYTES_MAX;
        let cannot = |c: char| c == '"' || c.is_control();
        if !block::name::fits(name, most) || name.contains(cannot) {
            return Err(Error::invalid(format!(
                "the parent's name '{}': a descriptor has names of 1 to {most} bytes without quotes and control characters",
                block::name::shown(name).escape_default()
            )));
        }
    }
    let parts = Parts::read(file)?;
    let is_embedded = parts.text.start > 0;
    // At most 1 MiB.
    let bytes = read_short(
        file,
        parts.text.start,
        (parts.text.end - parts.text.start) as usize,
    )?;
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let text = bytes.get(..end).unwrap_or_default();
    let writes = rewrite(text, parent)?;
    let room = (parts.text.end - parts.text.start) as usize;
    if is_embedded && writes.iter().any(|(at, bytes)| at + bytes.len() > room) {
        return Err(Error::unsupported(format!(
            "the descriptor has {} sectors, which have no room for the parent's name",
            room / LEN
        )));
    }
    // What is written must be what is meant.
    let mut new = bytes.clone();
    for (at, bytes) in &writes {
        new.resize(new.len().max(at + bytes.len()), 0);
        if let Some(place) = new.get_mut(*at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    let read = Descriptor::parse(&new)?;
    let link = (read.parent.as_deref(), read.parent_cid);
    let wanted = parent.map_or((None, NO_PARENT), |(name, cid)| (Some(name), cid));
    if link != wanted
        || read.extents != parts.descriptor.extents
        || read.cid != parts.descriptor.cid
    {
        return Err(Error::unsupported(
            "its descriptor is not laid out so that the parent's name could be changed: convert it",
        ));
    }
    for (at, bytes) in &writes {
        file.write_at(parts.text.start + *at as u64, bytes)?;
        file.sync()?;
    }
    Ok(())
}

/// What is to be written in place of `text`, a descriptor, each durable before the next: where, and the bytes. The last is
/// of one sector.
fn rewrite(text: &[u8], parent: Option<(&str, u32)>) -> Result<Vec<(usize, Vec<u8>)>> {
    let no_room = || {
        Error::unsupported(format!(
            "the parent's name has {} bytes: the sector of the descriptor that says which image is the parent has no room for \
             it: give it a shorter name, or convert the image",
            parent.map_or(0, |(name, _)| block::name::len(name))
        ))
    };
    if text.len() < LEN {
        let (head, rest) = split(&relink(text, parent, false)).ok_or_else(no_room)?;
        if rest.is_empty() {
            // No shorter than it was: a file of text goes on with blank lines.
            let mut head = head;
            head.resize(head.len().max(text.len()), b'\n');
            return Ok(vec![(0, zeros_behind(head))]);
        }
        let mut head = head;
        head.resize(LEN, b'\n');
        return Ok(vec![(LEN, zeros_behind(rest)), (0, head)]);
    }
    // The sector where the link is, of which only whole lines change.
    let mut at = 0;
    let starts = text.split(|b| *b == b'\n').map(|line| {
        let start = at;
        at += line.len() + 1;
        (start, line)
    });
    let found = starts
        .filter(|(_, line)| is_key(line, "parentcid"))
        .map(|(start, _)| start);
    let sector = found.last().unwrap_or(0) / LEN * LEN;
    let own = text
        .get(sector..text.len().min(sector + LEN))
        .unwrap_or_default();
    let first = match sector {
        0 => 0,
        _ => own
            .iter()
            .position(|b| *b == b'\n')
            .map_or(own.len(), |at| at + 1),
    };
    let last = own
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(first, |at| at + 1)
        .max(first);
    let (before, lines, behind) = (
        own.get(..first).unwrap_or_default(),
        own.get(first..last).unwrap_or_default(),
        own.get(last..).unwrap_or_default(),
    );
    for sparing in [false, true] {
        let mut new = relink(lines, parent, sparing);
        if new.len() <= lines.len() {
            new.resize(lines.len(), b'\n');
            let bytes = [before, &new, behind].concat();
            return Ok(vec![(sector, bytes)]);
        }
    }
    Err(no_room())
}

/// Whole lines for what fits in a sector, and the rest; `None` where the link does not fit.
fn split(text: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    if text.len() < LEN {
        return Some((text.to_vec(), Vec::new()));
    }
    let fits = text.get(..LEN)?;
    let end = fits.iter().rposition(|b| *b == b'\n')? + 1;
    let (head, rest) = text.split_at_checked(end)?;
    let link = |line: &[u8]| is_key(line, "parentcid") || is_key(line, "parentfilenamehint");
    let behind = rest.split(|b| *b == b'\n').any(link);
    (!behind).then(|| (head.to_vec(), rest.to_vec()))
}

fn zeros_behind(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(LEN), 0);
    bytes
}

/// Whether a line gives that key, in lower case, a value.
fn is_key(line: &[u8], key: &str) -> bool {
    let mut halves = line.splitn(2, |b| *b == b'=');
    let name = halves.next().unwrap_or_default().trim_ascii();
    halves.next().is_some() && name.eq_ignore_ascii_case(key.as_bytes())
}

/// The lines with that link; `sparing`: without comments but the first, and without blank lines.
fn relink(lines: &[u8], parent: Option<(&str, u32)>, sparing: bool) -> Vec<u8> {
    let mut new = Vec::with_capacity(lines.len() + LEN);
    let mut had_comment = false;
    for line in lines.split_inclusive(|b| *b == b'\n') {
        let text = line.trim_ascii();
        if is_key(text, "parentfilenamehint") {
            continue;
        }
        let is_comment = text.starts_with(b"#");
        if sparing && (text.is_empty() || is_comment && had_comment) {
            continue;
        }
        had_comment |= is_comment;
        if !is_key(text, "parentcid") {
            new.extend_from_slice(line);
            continue;
        }
        let end = match line.ends_with(b"\r\n") {
            true => "\r\n",
            false => "\n",
        };
        let cid = parent.map_or(NO_PARENT, |(_, cid)| cid);
        new.extend_from_slice(format!("parentCID={cid:08x}{end}").as_bytes());
        if let Some((name, _)) = parent {
            let hint = format!("parentFileNameHint=\"{name}\"{end}");
            new.extend_from_slice(&block::name::bytes(&hint));
        }
    }
    new
}

/// Takes everything out of the image of `parts` over a parent, which nobody else may use: it reads as its parent then, which
/// has it all. `files` by [`FileId`], as for [`super::Vmdk::open`].
///
/// # Errors
///
/// `Unsupported` for an image without a parent, and for one that is not only of grains that may be written; what the host
/// fails with.
pub fn empty(parts: &Parts, files: &[&dyn Storage]) -> Result<()> {
    let name = files.first().map_or_else(String::new, |file| file.name());
    if !parts.descriptor.has_parent() {
        let why = "it has no parent that could have it all";
        return Err(Error::unsupported(why).within(name));
    }
    let mut sparse = Vec::new();
    for (line, id) in parts.extents() {
        let file = files.get(usize::from(id.0));
        let file = *file.ok_or_else(|| Error::invalid("emptied without all of its files"))?;
        let embedded = parts.header.as_ref().filter(|_| id == FileId::IMAGE);
        sparse.push((
            file,
            hosted_to_write(&line, embedded, file).context(|| file.name())?,
        ));
    }
    for (file, (tables, end)) in &sparse {
        empty_extent(*file, tables, *end).context(|| file.name())?;
    }
    Ok(())
}

/// Empties all grain tables, and cuts the file off at `end`.
fn empty_extent(file: &dyn Storage, tables: &Tables, end: u64) -> Result<()> {
    for at in tables.l1.iter().chain(&tables.copies) {
        file.write_zeroes(*at, tables.table_bytes(), false)?;
    }
    file.sync()?;
    if end < file.len()? {
        file.set_len(end)?;
        file.sync()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::MemFile;

    const HEAD: &str = "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=00000002\ncreateType=\"monolithicSparse\"\n";

    /// What comes of a descriptor when its writes are cut off anywhere is the old link or the new one.
    fn apply(text: &str, parent: Option<(&str, u32)>) -> Result<Vec<Descriptor>> {
        let mut bytes = text.as_bytes().to_vec();
        let mut states = vec![Descriptor::parse(&bytes)?];
        for (at, write) in rewrite(text.as_bytes(), parent)? {
            assert!(at == 0 || at % LEN == 0);
            bytes.resize(bytes.len().max(at + write.len()), 0);
            bytes[at..at + write.len()].copy_from_slice(&write);
            states.push(Descriptor::parse(&bytes)?);
        }
        Ok(states)
    }

    #[test]
    fn links_change_in_one_sector() {
        let hint = "parentFileNameHint=\"base.vmdk\"\n";
        let rest = "\n# Extent description\nRW 131072 SPARSE \"top.vmdk\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\n";
        let many: String = (0..40)
            .map(|n| format!("RW 8 SPARSE \"top-s{n:03}.vmdk\"\n"))
            .collect();
        let long = "n".repeat(300);
        for (text, parent, extents) in [
            (format!("{HEAD}{hint}{rest}"), Some(("other.vmdk", 7)), 1),
            (format!("{HEAD}{hint}{rest}"), None, 1),
            (format!("{HEAD}{rest}"), Some(("b", 7)), 1),
            (format!("{HEAD}{hint}{rest}"), Some((long.as_str(), 7)), 1),
            (
                format!("{HEAD}{hint}\n# Extents\n{many}"),
                Some(("longer-base.vmdk", 7)),
                40,
            ),
            (format!("{HEAD}{hint}\n# Extents\n{many}"), None, 40),
        ] {
            let states = apply(&text, parent).unwrap();
            let (last, first) = (states.last().unwrap(), states.first().unwrap());
            let link = parent.map_or((None, NO_PARENT), |(name, cid)| (Some(name), cid));
            assert_eq!((last.parent.as_deref(), last.parent_cid), link, "{text}");
            assert_eq!((last.cid, last.extents.len()), (1, extents), "{text}");
            assert_eq!(last.extents, first.extents, "{text}");
            assert_eq!(last.create_type, "monolithicSparse");
            for state in &states[..states.len() - 1] {
                assert_eq!(state, first, "{text}");
            }
        }
        let many = format!("{HEAD}{hint}{many}");
        assert!(apply(&many, Some((&long, 7))).is_err());
        let huge = "n".repeat(500);
        assert!(apply(&format!("{HEAD}{rest}"), Some((&huge, 7))).is_err());
    }

    /// What was laid out in two sectors once changes within the first from then on.
    #[test]
    fn links_change_again() {
        let disk = MemFile::default();
        let text = format!("{HEAD}parentFileNameHint=\"a\"\nRW 8 ZERO\n");
        disk.write_at(0, text.as_bytes()).unwrap();
        for name in ["b".repeat(330), "c".repeat(10), "d".repeat(300)] {
            set_parent(&disk, Some((&name, 3))).unwrap();
            let read = Parts::read(&disk).unwrap().descriptor;
            assert_eq!(
                (read.parent.as_deref(), read.parent_cid),
                (Some(name.as_str()), 3)
            );
        }
        for bad in ["", "a\"b", "a\nb"] {
            assert!(set_parent(&disk, Some((bad, 3))).is_err(), "{bad:?}");
        }
        set_parent(&disk, None).unwrap();
        assert!(!Parts::read(&disk).unwrap().descriptor.has_parent());
    }
}
