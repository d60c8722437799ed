//! Apple's disk images, from QEMU's `block/dmg.c` and not from our code.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// Kinds of chunks.
pub const ZERO: u32 = 0;
/// Bytes as they are.
pub const RAW: u32 = 1;
/// To be ignored: zeros.
pub const IGNORED: u32 = 2;
/// ADC, which nobody reads.
pub const ADC: u32 = 0x8000_0004;
/// A zlib stream.
pub const ZLIB: u32 = 0x8000_0005;
/// A bzip2 stream.
pub const BZIP2: u32 = 0x8000_0006;
/// An LZFSE stream.
pub const LZFSE: u32 = 0x8000_0007;
/// No chunk.
const COMMENT: u32 = 0x7fff_fffe;
const END: u32 = 0xffff_ffff;

/// Some sectors: how they are packed, how many, and the bytes in the file.
pub type Chunk = (u32, u64, Vec<u8>);

/// Where the tables of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// In a property list.
    List,
    /// In a resource fork.
    Fork,
}

/// An image of these chunks behind one another, in two tables, with its tables there.
pub fn image(chunks: &[Chunk], tables: Tables) -> Vec<u8> {
    let mut bytes = b"something else before the data fork".to_vec();
    let data_fork = bytes.len() as u64;
    let (mut sector, mut mish) = (0, Vec::new());
    for half in [&chunks[..chunks.len() / 2], &chunks[chunks.len() / 2..]] {
        // Chunks are counted from the table's beginning, on the disk and in the data fork.
        let place = bytes.len() as u64 - data_fork;
        mish.push(table(half, sector, place));
        for (_, count, data) in half {
            sector = u64::wrapping_add(sector, *count);
            bytes.extend(data);
        }
    }
    let at = bytes.len() as u64;
    let (fork, list) = match tables {
        Tables::List => {
            let data: String = mish
                .iter()
                .map(|table| {
                    let text = BASE64_STANDARD.encode(table);
                    let lines: Vec<&str> = text
                        .as_bytes()
                        .chunks(52)
                        .map(|line| std::str::from_utf8(line).expect("base64"))
                        .collect();
                    format!(
                        "<dict><key>Data</key><data>\n\t\t{}\n\t\t</data></dict>",
                        lines.join("\n\t\t")
                    )
                })
                .collect();
            let list = format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\"><dict><key>resource-fork</key><dict>\
                 <key>blkx</key><array>{data}</array><key>plst</key><array><dict><key>Data</key><data>AAAA</data></dict>\
                 </array></dict></dict></plist>\n"
            );
            bytes.extend(list.as_bytes());
            (0, list.len())
        }
        Tables::Fork => {
            let all: Vec<u8> = mish
                .iter()
                .flat_map(|table| {
                    let len = (table.len() as u32).to_be_bytes();
                    len.into_iter().chain(table.iter().copied())
                })
                .collect();
            let mut fork = vec![0; 16];
            fork[..4].copy_from_slice(&16u32.to_be_bytes());
            fork[8..12].copy_from_slice(&(all.len() as u32).to_be_bytes());
            fork.extend(all);
            bytes.extend(&fork);
            (fork.len(), 0)
        }
    };
    let mut trailer = vec![0; 512];
    let mut put = |at: usize, field: &[u8]| trailer[at..at + field.len()].copy_from_slice(field);
    put(0, b"koly\0\0\0\x04\0\0\x02\0");
    for (place, number) in [
        (0x18, data_fork),
        (0x28, at),
        (0x30, fork as u64),
        (0xd8, at),
        (0xe0, list as u64),
        (0x1ec, sector),
    ] {
        put(place, &number.to_be_bytes());
    }
    bytes.extend(trailer);
    bytes
}

fn table(chunks: &[Chunk], first: u64, place: u64) -> Vec<u8> {
    let mut table = vec![0; 204];
    table[..4].copy_from_slice(b"mish");
    table[8..16].copy_from_slice(&first.to_be_bytes());
    table[0x18..0x20].copy_from_slice(&place.to_be_bytes());
    let mut entry = |kind: u32, numbers: [u64; 4]| {
        table.extend(kind.to_be_bytes());
        table.extend(0u32.to_be_bytes());
        table.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
    };
    let (mut sector, mut at) = (0, 0);
    for (kind, count, data) in chunks {
        entry(COMMENT, [sector, 0, 0, 0]);
        entry(*kind, [sector, *count, at, data.len() as u64]);
        sector = u64::wrapping_add(sector, *count);
        at += data.len() as u64;
    }
    entry(END, [sector, 0, at, 0]);
    table
}
