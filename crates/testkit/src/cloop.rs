//! Images of the compressed loop driver, from QEMU's `block/cloop.c` and not from our code.

/// The script at the beginning.
const MAGIC: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

/// An image of `disk` in blocks of so many bytes, each as `pack` packs it. The last one is filled with zeros.
pub fn image(block: usize, disk: &[u8], pack: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let blocks: Vec<Vec<u8>> = disk
        .chunks(block)
        .map(|part| {
            let mut part = part.to_vec();
            part.resize(block, 0);
            pack(&part)
        })
        .collect();
    let mut bytes = MAGIC.to_vec();
    bytes.resize(128, 0);
    bytes.extend((block as u32).to_be_bytes());
    bytes.extend((blocks.len() as u32).to_be_bytes());
    let mut at = (136 + (blocks.len() + 1) * 8) as u64;
    bytes.extend(at.to_be_bytes());
    for packed in &blocks {
        at += packed.len() as u64;
        bytes.extend(at.to_be_bytes());
    }
    bytes.extend(blocks.concat());
    bytes
}

/// `bytes` as a zlib stream that packs nothing.
pub fn stored(bytes: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x78, 0x01];
    let mut parts = bytes.chunks(0xffff).peekable();
    while let Some(part) = parts.next() {
        let len = part.len() as u16;
        stream.push(u8::from(parts.peek().is_none()));
        stream.extend(len.to_le_bytes());
        stream.extend((!len).to_le_bytes());
        stream.extend(part);
    }
    let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (b + a) % 65521)
    });
    stream.extend((b << 16 | a).to_be_bytes());
    stream
}
