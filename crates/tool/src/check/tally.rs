//! What a check found.

use std::fmt;

/// Findings that are kept for people; the rest is only counted.
pub const FINDINGS_MAX: usize = 1000;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Space that nothing uses.
    Leak,
    /// Something contradicts something: data may be wrong, or become it.
    Corruption,
    /// The check itself could not do something.
    CheckError,
    /// Not counted: two structures, or structure and data, in one cluster.
    Overlap,
    /// Not counted: the end of the file cuts something. What was in the rest is lost.
    CutOff,
    /// Not counted, and nothing wrong: what the next writer will do.
    Note,
}

impl Severity {
    /// What starts its line.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Leak => "leak",
            Severity::Corruption => "error",
            Severity::CheckError => "check error",
            Severity::Overlap => "overlap",
            Severity::CutOff => "cut off",
            Severity::Note => "note",
        }
    }
}

/// One thing that is wrong, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What and where.
    pub text: String,
    /// The same in numbers, for who has words of their own for it.
    pub fact: Option<Fact>,
}

impl Finding {
    /// Whether it is a COPIED flag that denies a refcount.
    pub fn is_flag(&self) -> bool {
        matches!(
            self.fact,
            Some(Fact::L1Copied { .. } | Fact::L2Copied { .. })
        )
    }
}

/// A finding about a qcow2 image that QEMU has too, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A cluster's refcount is not the number of references to it.
    Refcount {
        /// Which cluster of the file.
        cluster: u64,
        /// Its refcount.
        refcount: u64,
        /// How many refer to it.
        references: u64,
    },
    /// A cluster has more references than its refcount can be.
    Overflow {
        /// Its first byte.
        offset: u64,
    },
    /// The COPIED flag of an L1 entry is not what the L2 table's refcount says.
    L1Copied {
        /// Which entry.
        index: u64,
        /// It.
        entry: u64,
        /// The table's refcount.
        refcount: u64,
    },
    /// The COPIED flag of an L2 entry is not what the cluster's refcount says.
    L2Copied {
        /// The entry.
        entry: u64,
        /// The cluster's refcount.
        refcount: u64,
    },
    /// Something refers to bytes behind the file's end.
    Beyond {
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
    },
}

/// What is said of a finding: words, and numbers where there are any.
#[derive(Debug)]
pub struct Said(String, Option<Fact>);

impl From<String> for Said {
    fn from(text: String) -> Self {
        Self(text, None)
    }
}

impl From<(String, Fact)> for Said {
    fn from((text, fact): (String, Fact)) -> Self {
        Self(text, Some(fact))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity.name(), self.text)
    }
}

/// Numbers of a check. They mean what those of `qemu-img check` mean, and are the same.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Contradictions, but for wrong COPIED flags.
    pub corruptions: u64,
    /// Wrong COPIED flags.
    pub flags: u64,
    /// Clusters whose refcount is higher than what refers to them.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// The refcounts cannot be repaired one by one, they have to be made anew.
    pub rebuild: bool,
    /// Refcount blocks that are behind the file's end.
    pub blocks_beyond: u64,
    /// Those that a file can be made to reach.
    pub blocks_growable: u64,
    /// Entries of the fault `MisalignedEmpty`.
    pub emptiable: u64,
    /// Something that refers to clusters could not be read: what, for people. Then clusters that
    /// seem leaked may not be.
    pub unread: Option<String>,
    /// Clusters that more than one kind of thing uses.
    pub overlaps: u64,
    /// What the end of the file cuts, or is all behind it.
    pub cut_off: u64,
    /// An L2 table is among it: what only that refers to seems unused.
    pub tables_cut: bool,
    /// A refcount block is cut.
    pub block_cut: bool,
    /// Guest clusters with data, in the active state.
    pub allocated: u64,
    /// Those that do not follow the one before in the file.
    pub fragmented: u64,
    /// Those that are compressed.
    pub compressed: u64,
    /// The highest cluster in use.
    pub last: Option<u64>,
    /// Entries of tables that were repaired.
    pub repaired: u64,
    /// What it is, in words: the first [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// Findings beyond these.
    pub findings_left_out: u64,
}

impl Tally {
    /// Counts `times` of something wrong.
    pub fn found<S: Into<Said>>(
        &mut self,
        severity: Severity,
        times: u64,
        text: impl FnOnce() -> S,
    ) {
        match severity {
            Severity::Leak => self.leaks += times,
            Severity::Corruption => self.corruptions += times,
            Severity::CheckError => self.check_errors += times,
            Severity::Overlap => self.overlaps += times,
            Severity::CutOff => self.cut_off += times,
            Severity::Note => {}
        }
        self.say(severity, text);
    }

    /// Counts a wrong COPIED flag, `times` times.
    pub fn wrong_flag(&mut self, times: u64, text: impl FnOnce() -> (String, Fact)) {
        self.flags += times;
        self.say(Severity::Corruption, text);
    }

    fn say<S: Into<Said>>(&mut self, severity: Severity, text: impl FnOnce() -> S) {
        if self.findings.len() < FINDINGS_MAX {
            let Said(text, fact) = text().into();
            self.findings.push(Finding {
                severity,
                text,
                fact,
            });
        } else {
            self.findings_left_out += 1;
        }
    }

    /// All corruptions.
    pub fn errors(&self) -> u64 {
        self.corruptions + self.flags
    }

    /// Adds what another window showed.
    pub fn merge(&mut self, other: Tally) {
        self.corruptions += other.corruptions;
        self.flags += other.flags;
        self.leaks += other.leaks;
        self.check_errors += other.check_errors;
        self.rebuild |= other.rebuild;
        self.blocks_beyond += other.blocks_beyond;
        self.blocks_growable += other.blocks_growable;
        self.emptiable += other.emptiable;
        if self.unread.is_none() {
            self.unread = other.unread;
        }
        self.overlaps += other.overlaps;
        self.cut_off += other.cut_off;
        self.tables_cut |= other.tables_cut;
        self.block_cut |= other.block_cut;
        self.allocated += other.allocated;
        self.fragmented += other.fragmented;
        self.compressed += other.compressed;
        self.last = self.last.max(other.last);
        self.repaired += other.repaired;
        self.findings_left_out += other.findings_left_out;
        for finding in other.findings {
            if self.findings.len() < FINDINGS_MAX {
                self.findings.push(finding);
            } else {
                self.findings_left_out += 1;
            }
        }
    }
}
