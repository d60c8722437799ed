//! Which image: every option of the format, as far as they go together.

use crate::peer::Random;

/// Where the guest's data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    Inside,
    Outside,
    /// In a file that must be the disk's raw image too.
    Raw,
}

/// How the guest's data are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    None,
    /// QEMU's first encryption: diskplane reads it.
    Aes,
    /// Options of QEMU and of diskplane, without `encrypt.`.
    Luks(&'static str),
}

/// What lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    None,
    RawShorter,
    RawLonger,
    Shorter,
    Longer,
    Compressed,
    Encrypted,
    /// qcow2 on qcow2.
    Deep,
}

/// The options of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    pub extended: bool,
    pub zstd: bool,
    pub lazy: bool,
    pub data: Data,
    pub cipher: Cipher,
    pub preallocation: &'static str,
    pub base: Base,
    /// Of many terabytes, of which a few places are used.
    pub huge: bool,
}

/// What both know.
pub const SUITES: [&str; 10] = [
    "cipher-alg=aes-256",
    "cipher-alg=aes-192,cipher-mode=xts,ivgen-alg=plain,hash-alg=sha1",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512",
    "cipher-alg=aes-256,cipher-mode=ctr,hash-alg=ripemd160",
    "cipher-alg=serpent-256,cipher-mode=xts,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha224",
    "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=plain64,hash-alg=sha384",
    "cipher-alg=serpent-192,cipher-mode=xts,ivgen-alg=plain",
    "cipher-alg=twofish-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256",
    "cipher-alg=twofish-128,cipher-mode=ecb,ivgen-alg=plain",
    "cipher-alg=twofish-192,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha512",
];

fn of<T: Copy>(random: &mut Random, all: &[T]) -> T {
    all[random.below(all.len() as u64) as usize]
}

impl Choice {
    /// Any image that QEMU can make. `turn` goes through the kinds, so that a few in a row show them all.
    pub fn any(random: &mut Random, turn: u64) -> Self {
        let mut choice = Self {
            version: if random.below(6) == 0 { 2 } else { 3 },
            cluster_bits: of(random, &[9, 10, 12, 12, 14, 16, 16, 16, 17, 21]),
            refcount_bits: 1 << random.below(7),
            extended: random.below(2) == 0,
            zstd: random.below(2) == 0,
            lazy: random.below(3) == 0,
            data: of(random, &[Data::Inside, Data::Inside, Data::Outside]),
            cipher: match random.below(4) {
                0 => Cipher::Luks(of(random, &SUITES)),
                _ => Cipher::None,
            },
            preallocation: of(random, &["off", "off", "off", "metadata", "falloc", "full"]),
            base: of(
                random,
                &[
                    Base::None,
                    Base::None,
                    Base::RawShorter,
                    Base::RawLonger,
                    Base::Shorter,
                    Base::Longer,
                    Base::Compressed,
                    Base::Encrypted,
                    Base::Deep,
                ],
            ),
            huge: random.below(10) == 0,
        };
        match turn % 8 {
            0 => (choice.data, choice.cipher) = (Data::Inside, Cipher::None),
            1 => choice.cipher = Cipher::Luks(of(random, &SUITES)),
            2 => (choice.data, choice.version) = (Data::Outside, 3),
            3 => (choice.extended, choice.version, choice.data) = (true, 3, Data::Inside),
            4 => choice.version = 2,
            5 => (choice.data, choice.base, choice.version) = (Data::Raw, Base::None, 3),
            6 => (choice.huge, choice.preallocation) = (true, "off"),
            _ => choice.cipher = of(random, &[Cipher::Aes, Cipher::None, Cipher::None]),
        }
        choice.fit()
    }

    /// Options for the target of a copy, which has no base.
    pub fn copy(random: &mut Random, huge: bool) -> Self {
        let turn = random.next();
        let mut choice = Self::any(random, turn);
        (choice.base, choice.huge) = (Base::None, huge);
        if choice.cipher == Cipher::Aes {
            choice.cipher = Cipher::None;
        }
        choice.fit()
    }

    /// Takes back what does not go with the rest.
    fn fit(mut self) -> Self {
        if self.huge {
            self.cluster_bits = self.cluster_bits.clamp(12, 17);
            self.preallocation = "off";
            if self.data == Data::Raw {
                self.data = Data::Outside;
            }
        }
        if self.extended && self.version == 3 {
            self.cluster_bits = self.cluster_bits.max(14);
        }
        if self.version == 2 {
            (self.extended, self.zstd, self.lazy, self.data) = (false, false, false, Data::Inside);
            self.refcount_bits = 16;
        }
        if self.data == Data::Raw {
            self.base = Base::None;
            self.cipher = Cipher::None;
        }
        // QEMU's preallocated clusters of an encrypted image read as noise.
        if self.cipher != Cipher::None || (self.base != Base::None && !self.extended) {
            self.preallocation = "off";
        }
        // With an old file format it refuses to write in the old cipher.
        self
    }

    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether diskplane writes such an image.
    pub fn writable(&self) -> bool {
        self.cipher != Cipher::Aes
    }

    /// `-o` of both tools, but for encryption and the base.
    pub fn options(&self, data_file: &str) -> String {
        let switch = |on| if on { "on" } else { "off" };
        let mut text = format!(
            "compat={},cluster_size={},refcount_bits={},lazy_refcounts={},extended_l2={},preallocation={}",
            if self.version == 2 { "0.10" } else { "1.1" },
            self.cluster(),
            self.refcount_bits,
            switch(self.lazy),
            switch(self.extended),
            self.preallocation,
        );
        if self.version == 3 {
            let kind = if self.zstd { "zstd" } else { "zlib" };
            text.push_str(&format!(",compression_type={kind}"));
        }
        if self.data != Data::Inside {
            text.push_str(&format!(
                ",data_file={data_file},data_file_raw={}",
                switch(self.data == Data::Raw)
            ));
        }
        text
    }

    /// `-o` for the encryption with the passphrase of object `secret`.
    pub fn encryption(&self, secret: &str) -> String {
        let suite = match self.cipher {
            Cipher::None => return String::new(),
            Cipher::Aes => return format!("encrypt.format=aes,encrypt.key-secret={secret}"),
            Cipher::Luks(suite) => suite,
        };
        let mut text =
            format!("encrypt.format=luks,encrypt.key-secret={secret},encrypt.iter-time=1");
        for pair in suite.split(',') {
            text.push_str(&format!(",encrypt.{pair}"));
        }
        text
    }
}
