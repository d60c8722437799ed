//! Why QEMU refuses to open an image: what it looks at in the headers of each format, in its order, and what it says.
//!
//! Scripts look for these words, so they are chosen here, where the same is looked at, for images that diskplane has
//! refused already. Where QEMU finds nothing wrong there is nothing to say of it, and diskplane's own reason stands.
//! Sources: the `open` functions of QEMU's `block/*.c` and `crypto/block-luks.c`.

use block::{Result, Storage};
use image::{Format, vhd};

/// What the look at one header comes to: what QEMU says, where it says something.
type Looked = Result<(), String>;

/// Bytes of a header that are looked at, at most.
const HEAD_BYTES: usize = 1536;
/// Bytes of a descriptor in text that are, as there.
const TEXT_BYTES: usize = (1 << 20) - 1;

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Its disk is read.
    Read,
    /// Written, too.
    Write,
    /// It is checked: what the check looks at itself keeps none from opening it.
    Check,
}

/// Says `why` unless it `holds`.
fn expect(holds: bool, why: impl Into<String>) -> Looked {
    match holds {
        true => Ok(()),
        false => Err(why.into()),
    }
}

/// Why QEMU does not open `file` as an image of `format`. `None` where it would, or where that cannot be found out.
pub fn by_header(file: &dyn Storage, format: Format, purpose: Purpose) -> Option<String> {
    let head = Head::read(file, 0, HEAD_BYTES).ok()?;
    let looked = match format {
        Format::Qcow2 => qcow2(&head, purpose),
        Format::Qcow => qcow(&head),
        Format::Qed => qed(&head),
        Format::Vdi => vdi(&head),
        Format::Vhd => vpc(&head, file),
        Format::Vhdx => expect(head.begins(b"vhdxfile"), invalid(file)),
        Format::Vmdk => vmdk(&head, file, purpose == Purpose::Write),
        Format::Parallels => parallels(&head),
        Format::Luks => luks(&head),
        _ => Ok(()),
    };
    looked.err()
}

/// What is said where a driver gives an errno, and no words.
fn invalid(file: &dyn Storage) -> String {
    let name = file.name();
    format!("Could not open '{name}': Invalid argument")
}

/// The first bytes of a file, or of a part of it; what it is too short for are zeros, as QEMU reads them.
struct Head {
    bytes: Vec<u8>,
    /// Bytes of the whole file.
    file_bytes: u64,
}

impl Head {
    fn read(file: &dyn Storage, offset: u64, len: usize) -> Result<Self> {
        let file_bytes = file.len()?;
        let mut bytes = vec![0; len];
        let there = file_bytes.saturating_sub(offset);
        let there = usize::try_from(there).unwrap_or(len).min(len);
        if let Some(part) = bytes.get_mut(..there).filter(|part| !part.is_empty()) {
            file.read_at(offset, part)?;
        }
        Ok(Self { bytes, file_bytes })
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
        field.copied().unwrap_or([0; N])
    }

    fn begins(&self, magic: &[u8]) -> bool {
        self.bytes.starts_with(magic)
    }

    fn be16(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.field(at))
    }

    fn be32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.field(at))
    }

    fn be64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.field(at))
    }

    fn le32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.field(at))
    }

    fn le64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.field(at))
    }
}

/// `qcow2_do_open`.
fn qcow2(head: &Head, purpose: Purpose) -> Looked {
    let checked = purpose == Purpose::Check;
    const COMPRESSION: u64 = 1 << 3;
    const EXTENDED_L2: u64 = 1 << 4;
    let (version, cluster_bits) = (head.be32(4), head.be32(20));
    expect(head.begins(b"QFI\xfb"), "Image is not in qcow2 format")?;
    expect(
        (2..=3).contains(&version),
        format!("Unsupported qcow2 version {version}"),
    )?;
    expect(
        (9..=21).contains(&cluster_bits),
        format!("Unsupported cluster size: 2^{cluster_bits}"),
    )?;
    let cluster = 1u64 << cluster_bits;
    let mut features = 0;
    if version == 3 {
        features = head.be64(72);
        let length = head.be32(100);
        expect(length >= 104, "qcow2 header too short")?;
        expect(
            u64::from(length) <= cluster,
            "qcow2 header exceeds cluster size",
        )?;
        expect(head.be64(8) <= cluster, "Invalid backing file offset")?;
        let [compression] = if length > 104 { head.field(104) } else { [0] };
        expect(
            compression <= 1,
            format!("qcow2: unknown compression type: {compression}"),
        )?;
        let marked = features & COMPRESSION != 0;
        expect(
            marked == (compression != 0),
            format!(
                "qcow2: Compression type incompatible feature bit must {}be set",
                if marked { "not " } else { "" }
            ),
        )?;
        // What is to be said of features that nobody knows the open has found out.
        if features >> 5 != 0 {
            return Ok(());
        }
        let subcluster = if features & EXTENDED_L2 != 0 {
            cluster / 32
        } else {
            cluster
        };
        expect(
            subcluster >= 512,
            format!("Unsupported subcluster size: {subcluster}"),
        )?;
        expect(
            head.be32(96) <= 6,
            "Reference count entry width too large; may not exceed 64 bits",
        )?;
    }
    expect(head.be64(8) <= cluster, "Invalid backing file offset")?;
    let table = |offset: u64, entries: u32, entry: u64, most: u64, what: &str| {
        let entries = u64::from(entries);
        expect(entries <= most / entry, format!("{what} too large"))?;
        expect(
            offset <= i64::MAX as u64 - entries * entry && offset.is_multiple_of(cluster),
            format!("{what} offset invalid"),
        )
    };
    let clusters = head.be32(56);
    expect(
        clusters != 0 || checked,
        "Image does not contain a reference count table",
    )?;
    let what = "Reference count table";
    table(head.be64(48), clusters, cluster, 8 << 20, what)?;
    if !checked {
        table(head.be64(64), head.be32(60), 40, 40 << 16, "Snapshot table")?;
    }
    table(head.be64(40), head.be32(36), 8, 32 << 20, "Active L1 table")?;
    // Entries of 8 or 16 bytes.
    let entry_bits = if features & EXTENDED_L2 != 0 { 4 } else { 3 };
    let shift = 2 * cluster_bits - entry_bits;
    let needed = head.be64(24).div_ceil(1 << shift);
    expect(needed <= i32::MAX as u64, "Image is too big")?;
    expect(u64::from(head.be32(36)) >= needed, "L1 table is too small")?;
    let method = head.be32(32);
    expect(
        method <= 2,
        format!("Unsupported encryption method {method}"),
    )
}

/// `qcow_open`.
fn qcow(head: &Head) -> Looked {
    expect(head.begins(b"QFI\xfb"), "Image not in qcow format")?;
    let version = head.be32(4);
    if version != 1 {
        let hint = match version {
            2 | 3 => "\nTry the 'qcow2' driver instead.",
            _ => "",
        };
        return Err(format!(
            "qcow (v1) does not support qcow version {version}{hint}"
        ));
    }
    let size = head.be64(24);
    let [cluster_bits, l2_bits] = head.field(32);
    expect(
        size > 1,
        "Image size is too small (must be at least 2 bytes)",
    )?;
    expect(
        (9..=16).contains(&cluster_bits),
        "Cluster size must be between 512 and 64k",
    )?;
    expect(
        (6..=13).contains(&l2_bits),
        "L2 table size must be between 512 and 64k",
    )?;
    expect(
        head.be32(36) <= 1,
        "invalid encryption method in qcow header",
    )?;
    let entries = size.div_ceil(1 << (cluster_bits + l2_bits));
    expect(entries <= i32::MAX as u64 / 8, "Image too large")?;
    expect(head.be32(16) <= 1023, "Backing file name too long")
}

/// `bdrv_qed_do_open`.
fn qed(head: &Head) -> Looked {
    expect(head.begins(b"QED\0"), "Image not in QED format")?;
    let unknown = head.le64(16) & !7;
    expect(
        unknown == 0,
        format!("Unsupported QED features: {unknown:x}"),
    )?;
    let (cluster, tables, pages) = (head.le32(4), head.le32(8), head.le32(12));
    expect(
        cluster.is_power_of_two() && (4096..=64 << 20).contains(&cluster),
        "QED cluster size is invalid",
    )?;
    expect(
        tables.is_power_of_two() && tables <= 16,
        "QED table size is invalid",
    )?;
    let (cluster, tables) = (u64::from(cluster), u64::from(tables));
    let entries = u128::from(cluster * tables / 8);
    let size = head.le64(48);
    expect(
        size.is_multiple_of(512) && u128::from(size) <= entries * entries * u128::from(cluster),
        "QED image size is invalid",
    )?;
    let (l1, header) = (head.le64(40), u64::from(pages) * cluster);
    let last = l1.wrapping_add((tables - 1) * cluster);
    let end = head.file_bytes / cluster * cluster;
    let lies = |at: u64| at.is_multiple_of(cluster) && (header..end).contains(&at);
    expect(
        last > l1 && lies(l1) && lies(last),
        "QED table offset is invalid",
    )?;
    expect(
        u32::try_from(header).is_ok(),
        "QED header size is too large",
    )?;
    let (name, len) = (u64::from(head.le32(56)), u64::from(head.le32(60)));
    expect(
        head.le64(16) & 1 == 0 || name + len <= header,
        "QED backing filename offset is invalid",
    )
}

/// `vdi_open`.
fn vdi(head: &Head) -> Looked {
    const BLOCK: u64 = 1 << 20;
    const BLOCKS_MAX: u64 = (1 << 29) - 128;
    let size = head.le64(0x170);
    let (signature, version) = (head.le32(0x40), head.le32(0x44));
    let (map, data) = (head.le32(0x154), head.le32(0x158));
    let (sector, block, blocks) = (head.le32(0x168), head.le32(0x178), head.le32(0x180));
    let unsupported = |what: String| format!("unsupported VDI image ({what})");
    let most = BLOCKS_MAX * BLOCK;
    expect(
        size <= most,
        format!("Unsupported VDI image size (size is {size:#x}, max supported is {most:#x})"),
    )?;
    let size = size.next_multiple_of(512);
    expect(
        signature == 0xbeda_107f,
        format!("Image not in VDI format (bad signature {signature:08x})"),
    )?;
    let known = format!("version {}.{}", version >> 16, version & 0xffff);
    expect(version == 0x0001_0001, unsupported(known))?;
    expect(
        map.is_multiple_of(512),
        unsupported(format!("unaligned block map offset {map:#x}")),
    )?;
    expect(
        data.is_multiple_of(512),
        unsupported(format!("unaligned data offset {data:#x}")),
    )?;
    expect(
        sector == 512,
        unsupported(format!("sector size {sector} is not 512")),
    )?;
    expect(
        u64::from(block) == BLOCK,
        unsupported(format!("block size {block} is not {BLOCK}")),
    )?;
    let room = u64::from(blocks) * BLOCK;
    expect(
        size <= room,
        unsupported(format!(
            "disk size {size}, image bitmap has room for {room}"
        )),
    )?;
    for (at, what) in [(0x1a8, "link"), (0x1b8, "parent")] {
        let none = head.field::<16>(at) == [0; 16];
        expect(none, unsupported(format!("non-NULL {what} UUID")))?;
    }
    expect(
        u64::from(blocks) <= BLOCKS_MAX,
        unsupported(format!("too many blocks {blocks}, max is {BLOCKS_MAX}")),
    )
}

/// `vpc_open`.
fn vpc(head: &Head, file: &dyn Storage) -> Looked {
    const FIXED: u32 = 2;
    let mut footer = head.field::<512>(0);
    let is_dynamic = footer.starts_with(b"conectix");
    if !is_dynamic {
        let at = head.file_bytes.checked_sub(512);
        let at = at.ok_or("File too small for a VHD header")?;
        if let Ok(end) = Head::read(file, at, HEAD_BYTES) {
            let fixed = end.begins(b"conectix") && end.be32(60) == FIXED;
            expect(fixed, "invalid VPC image")?;
            footer = end.field(0);
        }
    }
    let others = footer.iter().enumerate();
    let others = others.filter(|(at, _)| !(64..68).contains(at));
    let sum: u32 = others.map(|(_, byte)| u32::from(*byte)).sum();
    let footer = Head {
        bytes: footer.to_vec(),
        file_bytes: head.file_bytes,
    };
    expect(footer.be32(64) == !sum, "Incorrect header checksum")?;
    if !is_dynamic {
        return Ok(());
    }
    let parsed = vhd::Footer::parse(&footer.field(0));
    let (Ok(dynamic), Ok(Ok(size))) = (
        Head::read(file, footer.be64(16), HEAD_BYTES),
        parsed.map(|footer| footer.disk_bytes()),
    ) else {
        return Ok(());
    };
    expect(dynamic.begins(b"cxsparse"), "Invalid header magic")?;
    let (entries, block) = (dynamic.be32(28), dynamic.be32(32));
    expect(
        block.is_power_of_two() && block >= 512,
        format!("Invalid block size {block}"),
    )?;
    expect(
        u64::from(entries) * u64::from(block) >= size,
        "Page table too small",
    )?;
    expect(
        entries <= i32::MAX as u32 / 4,
        format!("Max Table Entries too large ({})", entries.cast_signed()),
    )?;
    let table = dynamic.be64(16).saturating_add(u64::from(entries) * 4);
    // Where a file cannot have it, it is not read.
    expect(table < 1 << 63, "Error reading pagetable")?;
    expect(
        table.next_multiple_of(512) <= head.file_bytes,
        "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.",
    )
}

/// `vmdk_open`, of a file that begins with a sparse extent's header.
fn vmdk(head: &Head, file: &dyn Storage, write: bool) -> Looked {
    const AT_END: u64 = u64::MAX;
    const HEADER_BYTES: usize = 512;
    expect(head.file_bytes >= 4, "File is too small, not a valid image")?;
    let descriptor = |at| {
        let text = Head::read(file, at, TEXT_BYTES);
        text.map_or(Ok(()), |text| vmdk_descriptor(&text.bytes))
    };
    if head.begins(b"COWD") {
        return Ok(());
    }
    if !head.begins(b"KDMV") {
        return descriptor(0);
    }
    let (capacity, at) = (head.le64(12), head.le64(28));
    if capacity == 0 && at != 0 {
        return descriptor(at.saturating_mul(512));
    }
    // The footer counts then: a marker, itself, and a marker that is empty.
    let footer = match head.le64(56) {
        AT_END => {
            let at = (head.file_bytes / 512 * 512).saturating_sub(1536);
            Head::read(file, at, HEAD_BYTES).ok()
        }
        _ => None,
    };
    let header = match footer {
        None => head.bytes.get(..HEADER_BYTES),
        Some(ref end) => {
            let sound = end
                .bytes
                .get(512..)
                .is_some_and(|rest| rest.starts_with(b"KDMV"))
                && end.le32(8) == 0
                && end.le32(12) == 3
                && end.le64(1024) == 0
                && end.le64(1032) == 0;
            expect(sound, "Invalid footer")?;
            end.bytes.get(512..1024)
        }
    };
    let header = Head {
        bytes: header.unwrap_or_default().to_vec(),
        file_bytes: head.file_bytes,
    };
    let (version, grain, entries) = (header.le32(4), header.le64(20), header.le32(44));
    let compressed = header.field::<2>(77) == 1u16.to_le_bytes();
    expect(version <= 3, format!("Unsupported VMDK version {version}"))?;
    expect(
        version != 3 || !write || compressed,
        "VMDK version 3 must be read only",
    )?;
    expect(entries <= 512, "L2 table size too big")?;
    // As an `unsigned int`, as there.
    let covered = u64::from(entries).wrapping_mul(grain) as u32;
    expect(covered != 0, "L1 entry size is invalid")?;
    let data = header.le64(64);
    expect(
        header.file_bytes / 512 >= data,
        format!(
            "File truncated, expecting at least {} bytes",
            data.wrapping_mul(512).cast_signed()
        ),
    )?;
    expect(
        grain <= 0x20_0000,
        "Invalid granularity, image may be corrupt",
    )?;
    let tables = header.le64(12).div_ceil(u64::from(covered)) as u32;
    expect(tables <= 32 << 20, "L1 size too big")
}

/// `vmdk_open_desc_file`.
fn vmdk_descriptor(bytes: &[u8]) -> Looked {
    const KNOWN: [&str; 6] = [
        "monolithicFlat",
        "vmfs",
        "vmfsSparse",
        "seSparse",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
    ];
    // It is a text of C's.
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let named = text.split_once("createType=\"");
    let named = named.and_then(|(_, rest)| rest.split_once('"'));
    let Some((kind, _)) = named.filter(|(kind, _)| kind.len() < 128) else {
        return Err("invalid VMDK image descriptor".to_owned());
    };
    expect(
        KNOWN.contains(&kind),
        format!("Unsupported image type '{}'", block::plain(kind)),
    )
}

/// `parallels_open`.
fn parallels(head: &Head) -> Looked {
    let known = [b"WithoutFreeSpace", b"WithouFreSpacExt"];
    expect(
        head.le32(16) == 2 && known.iter().any(|magic| head.begins(*magic)),
        "Image not in Parallels format",
    )?;
    let (sectors, entries) = (head.le32(28), head.le32(32));
    expect(sectors != 0, "Invalid image: Zero sectors per track")?;
    expect(
        sectors <= i32::MAX as u32 / 513,
        "Invalid image: Too big cluster",
    )?;
    expect(entries <= i32::MAX as u32 / 4, "Catalog too large")?;
    expect(
        head.le64(56) < i64::MAX as u64 / 512,
        "Invalid image: Too big offset",
    )
}

/// `qcrypto_block_luks_check_header` and `qcrypto_block_luks_parse_header`.
fn luks(head: &Head) -> Looked {
    const SLOTS: usize = 8;
    const STRIPES: u32 = 4000;
    const SLOT_ACTIVE: u32 = 0x00ac_71f3;
    const SLOT_INACTIVE: u32 = 0x0000_dead;
    // Sectors of the header.
    const HEADER: u32 = 8;
    expect(head.begins(b"LUKS\xba\xbe"), "Volume is not in LUKS format")?;
    let version = head.be16(6);
    expect(
        version == 1,
        format!("LUKS version {version} is not supported"),
    )?;
    let mut names =
        [(8, "cipher name"), (40, "cipher mode"), (72, "hash spec")].map(|(at, what)| {
            let field = head.field::<32>(at);
            let end = field.iter().position(|byte| *byte == 0);
            let name = end
                .and_then(|end| field.get(..end))
                .map(|name| String::from_utf8_lossy(name).into_owned());
            name.ok_or_else(|| format!("LUKS header {what} is not NUL terminated"))
        });
    for name in &mut names {
        if let Err(why) = name {
            return Err(std::mem::take(why));
        }
    }
    let payload = head.be32(104);
    expect(
        payload >= HEADER,
        "LUKS payload is overlapping with the header",
    )?;
    expect(head.be32(164) != 0, "LUKS key iteration count is zero")?;
    let key_bytes = head.be32(108);
    for slot in 0..SLOTS {
        let at = 208 + slot * 48;
        let (state, iterations) = (head.be32(at), head.be32(at + 4));
        let (start, stripes) = (head.be32(at + 40), head.be32(at + 44));
        expect(
            stripes == STRIPES,
            format!(
                "Keyslot {slot} is corrupted (stripes {} != {STRIPES})",
                stripes.cast_signed()
            ),
        )?;
        let active = state == SLOT_ACTIVE;
        expect(
            active || state == SLOT_INACTIVE,
            format!("Keyslot {slot} state (active/disable) is corrupted"),
        )?;
        expect(
            !active || iterations != 0,
            format!("Keyslot {slot} iteration count is zero"),
        )?;
        expect(
            start >= HEADER,
            format!("Keyslot {slot} is overlapping with the LUKS header"),
        )?;
        let sectors = (u64::from(key_bytes) * u64::from(stripes)).div_ceil(512);
        let sectors = sectors.next_multiple_of(u64::from(HEADER));
        expect(
            u64::from(start) + sectors <= u64::from(payload),
            format!("Keyslot {slot} is overlapping with the encrypted payload"),
        )?;
    }
    let [Ok(cipher), Ok(mode), Ok(hash)] = names else {
        return Ok(());
    };
    let Some((block_mode, _)) = mode.split_once('-') else {
        let mode = block::plain(&mode);
        return Err(format!("Unexpected cipher mode string format '{mode}'"));
    };
    let known = |what: &str, name: &str, names: &[&str]| {
        let name = block::plain(name);
        expect(
            names.contains(&&*name),
            format!("{what} '{name}' not supported"),
        )
    };
    known("Cipher mode", block_mode, &["ecb", "cbc", "xts", "ctr"])?;
    // Two keys in one.
    let bytes = match block_mode {
        "xts" => key_bytes / 2,
        _ => key_bytes,
    };
    let ciphers = ["aes", "cast5", "serpent", "twofish"];
    expect(
        ciphers.contains(&&*cipher) && matches!(bytes, 16 | 24 | 32),
        format!(
            "Algorithm '{}' with key size {bytes} bytes not supported",
            block::plain(&cipher)
        ),
    )?;
    let hashes = [
        "md5",
        "sha1",
        "sha224",
        "sha256",
        "sha384",
        "sha512",
        "ripemd160",
        "sm3",
    ];
    known("Hash algorithm", &hash, &hashes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::{Rng, memory::Memory};

    /// Bytes at places of a header.
    type Parts = &'static [(usize, &'static [u8])];

    /// Whatever a header says, looking at it ends, and does not panic.
    #[test]
    fn any_header_is_looked_at() {
        let headers: [(Format, Parts); 10] = [
            (Format::Qcow2, &[(0, b"QFI\xfb\0\0\0\x03"), (23, b"\x10")]),
            (Format::Qcow2, &[(0, b"QFI\xfb\0\0\0\x02"), (23, b"\x09")]),
            (
                Format::Qcow,
                &[(0, b"QFI\xfb\0\0\0\x01"), (32, b"\x0c\x09")],
            ),
            (Format::Qed, &[(0, b"QED\0\0\x10\0\0\x01\0\0\0\x01\0\0\0")]),
            (
                Format::Vdi,
                &[
                    (0x40, b"\x7f\x10\xda\xbe\x01\0\x01\0"),
                    (0x168, b"\0\x02\0\0"),
                ],
            ),
            (
                Format::Vhd,
                &[
                    (0, b"conectix"),
                    (8, b"\0\0\0\x02\0\x01\0\0\0\0\0\0\0\0\x02\0"),
                    // A dynamic disk of 8 MiB.
                    (48, b"\0\0\0\0\0\x80\0\0"),
                    (60, b"\0\0\0\x03"),
                    (512, b"cxsparse"),
                    // 4 entries, of blocks of 2 MiB.
                    (540, b"\0\0\0\x04\0\x20\0\0"),
                ],
            ),
            (Format::Vmdk, &[(0, b"KDMV\x01\0\0\0")]),
            (Format::Vmdk, &[(0, b"KDMV\x03\0\0\0"), (56, &[0xff; 8])]),
            (Format::Parallels, &[(0, b"WithoutFreeSpace\x02\0\0\0")]),
            (Format::Luks, &[(0, b"LUKS\xba\xbe\0\x01")]),
        ];
        let mut rng = Rng::new(1);
        for (format, parts) in headers {
            for _ in 0..4000 {
                let mut bytes = vec![0; 4096];
                for (at, part) in parts {
                    bytes[*at..at + part.len()].copy_from_slice(part);
                }
                for _ in 0..rng.below(4) {
                    let at =
                        [16, 80, 0x140, 520][rng.below(4) as usize] + rng.below(32) as usize * 4;
                    let word = match rng.below(4) {
                        0 => u64::MAX - rng.below(600),
                        1 => 1 << rng.below(64),
                        2 => rng.below(5000),
                        _ => rng.next(),
                    };
                    let word = match rng.below(2) {
                        0 => word.to_be_bytes(),
                        _ => word.to_le_bytes(),
                    };
                    bytes[at..at + 8].copy_from_slice(&word);
                }
                if format == Format::Vhd {
                    // The checksum is right.
                    bytes[64..68].fill(0);
                    let sum: u32 = bytes[..512].iter().map(|byte| u32::from(*byte)).sum();
                    bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
                }
                let file = Memory::new(&bytes, 1 << 20, 100);
                for purpose in [Purpose::Read, Purpose::Write, Purpose::Check] {
                    let _ = by_header(&file, format, purpose);
                }
            }
        }
    }
}
