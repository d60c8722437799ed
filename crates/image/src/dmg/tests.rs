//! Beside the installed QEMU, and what is damaged.

use super::{Dmg, trailer};
use crate::Image;
use crate::qcow2::testing::{Driver, MemFile, Rng, by_qemu};
use block::ErrorKind;
use testkit::cloop::stored;
use testkit::dmg::{ADC, BZIP2, Chunk, IGNORED, LZFSE, RAW, Tables, ZERO, ZLIB, image};

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 1024);
    let mut stream = bzip2::Compress::new(bzip2::Compression::best(), 30);
    let done = stream
        .compress_vec(bytes, &mut out, bzip2::Action::Finish)
        .unwrap();
    assert_eq!(done, bzip2::Status::StreamEnd);
    out
}

/// Chunks of every kind that is read, and what they read as. Streams have odd lengths, so raw bytes begin anywhere.
fn chunks(with_bzip2: bool) -> (Vec<Chunk>, Vec<u8>) {
    let mut rng = Rng(11);
    let mut part = |sectors: usize| -> Vec<u8> {
        (0..sectors * 512)
            .map(|at| if at % 1000 < 300 { rng.next() as u8 } else { 7 })
            .collect()
    };
    let [a, b, c, d, e] = [3, 512, 40, 1, 700].map(&mut part);
    let kind = if with_bzip2 { BZIP2 } else { ZLIB };
    let pack = |bytes: &[u8]| {
        if with_bzip2 {
            bzip2(bytes)
        } else {
            stored(bytes)
        }
    };
    let chunks = vec![
        (ZLIB, 3, stored(&a)),
        (RAW, 512, b.clone()),
        (ZERO, 100, Vec::new()),
        (kind, 40, pack(&c)),
        (IGNORED, 7, Vec::new()),
        (RAW, 1, d.clone()),
        (ZLIB, 700, stored(&e)),
        (ZERO, 200_000, Vec::new()),
    ];
    let zeros = |sectors: usize| vec![0; sectors * 512];
    (
        chunks,
        [a, b, zeros(100), c, zeros(7), d, e, zeros(200_000)].concat(),
    )
}

fn open(bytes: &[u8]) -> Driver<Dmg> {
    let file = MemFile::of(bytes.to_vec());
    Driver::of(file.clone(), Dmg::open(&file).unwrap())
}

/// A property list that is no XML: an element with another one's end, a name that is no UTF-8, something else in base64.
fn strange_list(mut bytes: Vec<u8>) -> Vec<u8> {
    for (what, with) in [
        (&b"</plist>"[..], &b"</wrong>"[..]),
        (b"<key>blkx", b"<key>\xff\xfe<&"),
        (b"<data>\n\t\t", b"<data>\n!\xfe"),
    ] {
        let at = bytes.windows(what.len()).position(|w| w == what).unwrap();
        bytes[at..at + with.len()].copy_from_slice(with);
    }
    bytes
}

#[test]
fn images_read_as_by_qemu() {
    for tables in [Tables::List, Tables::Fork] {
        // QEMU has bzip2 in a module, which need not be there.
        for with_bzip2 in [false, true] {
            let (chunks, disk) = chunks(with_bzip2);
            let bytes = image(&chunks, tables);
            let mut driver = open(&bytes);
            assert!(
                driver.read(0, disk.len() as u64).unwrap() == disk,
                "{tables:?}"
            );
            assert!(driver.read(2000, 70_000).unwrap() == disk[2000..72_000]);
            assert!(driver.write(0, &[1; 512]).is_err());
            if !with_bzip2 {
                assert!(by_qemu("dmg", &bytes) == disk, "{tables:?}");
            }
            if tables == Tables::List {
                let strange = strange_list(bytes.clone());
                let mut driver = open(&strange);
                let read = driver.read(0, disk.len() as u64).unwrap();
                assert!(read == disk);
                assert!(with_bzip2 || by_qemu("dmg", &strange) == disk);
            }
            // What was put behind the trailer, less than a sector.
            let mut longer = bytes.clone();
            longer.resize(bytes.len() + 511 - bytes.len() % 512, 0);
            assert!(open(&longer).read(0, 4096).unwrap() == disk[..4096]);
        }
    }
}

#[test]
fn what_nobody_unpacks_is_told_when_it_is_read() {
    for (kind, name) in [(ADC, "ADC"), (LZFSE, "LZFSE"), (0x8000_0009, "0x80000009")] {
        let chunks = [
            (RAW, 1, vec![5; 512]),
            (kind, 2, vec![1; 99]),
            (RAW, 1, vec![6; 512]),
        ];
        let mut driver = open(&image(&chunks, Tables::List));
        assert_eq!(driver.read(1536, 512).unwrap(), [6; 512]);
        let error = driver.read(600, 10).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let said = format!("sector 1 is packed as {name}, ");
        assert!(error.to_string().contains(&said), "{error}");
        let facts = driver.image.describe().facts;
        assert!(facts[0].1.contains(&format!("1 {name}")), "{facts:?}");
    }
}

#[test]
fn damaged_chunks_are_errors() {
    let sound = (RAW, 1, vec![5; 512]);
    for (chunk, what) in [
        ((RAW, 2, vec![1; 700]), "less than its sectors"),
        ((ZLIB, 1, Vec::new()), "is not in the file"),
        ((ZLIB, 1, vec![9; 30]), "zlib stream"),
        (
            (ZLIB, 2, stored(&[1; 512])),
            "unpacks to 512 bytes, not 1024",
        ),
        ((ZLIB, 1, stored(&[1; 1024])), "more than 512"),
        ((BZIP2, 1, vec![9; 30]), "bzip2 stream"),
        (
            (BZIP2, 2, bzip2(&[1; 512])),
            "unpacks to 512 bytes, not 1024",
        ),
        ((BZIP2, 1, bzip2(&[1; 5120])), "more than 512"),
        ((BZIP2, 1, bzip2(&[1; 512])[..20].to_vec()), "bzip2 stream"),
    ] {
        let count = chunk.1;
        let mut driver = open(&image(&[sound.clone(), chunk, sound.clone()], Tables::List));
        let error = driver.read(512, count * 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert_eq!(driver.read((1 + count) * 512, 512).unwrap(), [5; 512]);
    }
}

#[test]
fn wrong_trailers_and_tables_are_refused() {
    let bytes = image(&[sound(), sound()], Tables::List);
    let fork = image(&[sound(), sound()], Tables::Fork);
    fn sound() -> Chunk {
        (RAW, 1, vec![5; 512])
    }
    let end = bytes.len() - 512;
    let last = bytes.windows(7).rposition(|w| w == b"</data>").unwrap();
    let resource = crate::words::read_u64(&fork, fork.len() - 512 + 0x28).unwrap() as usize + 16;
    let max = u64::MAX.to_be_bytes();
    for (base, at, patch, what) in [
        (&bytes, end, &b"kolz"[..], "no trailer"),
        (&bytes, end + 0x18, &max, "data fork"),
        (&bytes, end + 0x28, &max, "resource fork"),
        (&bytes, end + 0xd8, &max, "property list"),
        (&bytes, end + 0xe0, &max, "property list"),
        (&bytes, end + 0xe0, &[0; 8], "neither"),
        (&bytes, end + 0x1ec, &max, "sectors of the disk"),
        (&bytes, last, b"</dado>", "it ends within the table"),
        (&fork, resource, &[0; 4], "a resource has"),
        (
            &fork,
            fork.len() - 512 + 0x30,
            &[0, 0, 0, 0, 0, 0, 0, 7],
            "resources at byte",
        ),
    ] {
        let file = MemFile::of(base.clone());
        file.patch(at, patch);
        let error = Dmg::open(&file).unwrap_err().to_string();
        assert!(error.contains(what), "{at:#x} {patch:x?}: {error}");
    }
    for len in [0, 100, 512, 1000] {
        assert!(Dmg::open(&MemFile::of(vec![0; len])).is_err());
    }
    for (chunk, what) in [
        (
            (ZLIB, (64 << 11) + 1, vec![1]),
            "sectors: the most is 131072",
        ),
        ((RAW, u64::MAX, Vec::new()), "sectors: the most is 131072"),
        ((ZERO, u64::MAX, Vec::new()), "behind what"),
    ] {
        let file = MemFile::of(image(&[chunk, sound()], Tables::Fork));
        let error = Dmg::open(&file).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    // Two tables that have the same sectors.
    let at = bytes.windows(6).position(|w| w == b"<data>").unwrap();
    let mut twice = bytes.clone();
    let first = bytes[at..]
        .windows(7)
        .position(|w| w == b"</data>")
        .unwrap();
    let second = at
        + first
        + 7
        + bytes[at + first + 7..]
            .windows(6)
            .position(|w| w == b"<data>")
            .unwrap();
    let table = bytes[at..at + first].to_vec();
    twice[second..second + table.len()].copy_from_slice(&table);
    let error = Dmg::open(&MemFile::of(twice)).unwrap_err().to_string();
    assert!(error.contains("sector 0 is in two chunks"), "{error}");
    assert_eq!(trailer(&MemFile::of(bytes)).unwrap(), Some(end as u64));
}
