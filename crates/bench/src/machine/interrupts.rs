//! Interrupts by their source, from `/proc/interrupts`: of this machine or, as text, of a guest.
//!
//! ```text
//!             CPU0       CPU1
//!   24:          0      81922  PCI-MSIX-0000:00:02.0   1-edge   virtio1-req.0     a device's: named by the last word
//!  LOC:     912345     812345  Local timer interrupts                             the architecture's: named by the label
//! ```

use std::collections::BTreeMap;

/// How many there were so far, or in some stretch of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sources(BTreeMap<String, u64>);

impl Sources {
    /// From `/proc/interrupts`.
    pub(crate) fn parse(text: &str) -> Self {
        let mut sources = BTreeMap::new();
        let mut lines = text.lines();
        // One column for each CPU that is there.
        let cpus = lines.next().unwrap_or_default().split_whitespace().count();
        for line in lines {
            let Some((label, rest)) = line.split_once(':') else {
                continue;
            };
            let words: Vec<&str> = rest.split_whitespace().collect();
            let counts = words.iter().take(cpus).map_while(|word| word.parse().ok());
            let counts: Vec<u64> = counts.collect();
            let label = label.trim();
            let device = label.chars().all(|c| c.is_ascii_digit());
            // Two devices on one line are the last words, with a comma; a line without a device has no more than its number.
            let name = match (device, words.get(counts.len()..)) {
                (true, Some([.., name])) => name,
                _ => label,
            };
            let count = counts.iter().fold(0, |sum: u64, n| sum.saturating_add(*n));
            let own: &mut u64 = sources.entry(name.to_owned()).or_default();
            *own = own.saturating_add(count);
        }
        Self(sources)
    }

    /// Those since `before`; sources that had none are left out.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let of = |(name, count): (&String, &u64)| {
            let earlier = before.0.get(name).copied().unwrap_or_default();
            let since = count.saturating_sub(earlier);
            (since > 0).then(|| (name.clone(), since))
        };
        Self(self.0.iter().filter_map(of).collect())
    }

    /// With those of another stretch.
    pub(crate) fn add(&mut self, other: &Self) {
        for (name, count) in &other.0 {
            let own = self.0.entry(name.clone()).or_default();
            *own = own.saturating_add(*count);
        }
    }

    /// All together.
    pub(crate) fn all(&self) -> u64 {
        self.0.values().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// A second, where they are those of `seconds`.
    pub(crate) fn rates(&self, seconds: f64) -> BTreeMap<String, f64> {
        let rate = |(name, count): (&String, &u64)| (name.clone(), *count as f64 / seconds);
        self.0.iter().map(rate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_named_and_counted() {
        let text = |disk: u64, timer: u64| {
            format!(
                "           CPU0       CPU1\n \
                 4:       1      2   IO-APIC   4-edge      ttyS0\n \
                 24:     {disk}     5   PCI-MSIX-0000:00:02.0   1-edge      virtio1-req.0\n \
                 25:     0     7   PCI-MSIX-0000:00:02.0   2-edge      virtio1-req.0\n\
                 LOC:    {timer}   10   Local timer interrupts\n\
                 ERR:    3\n\
                 junk\n"
            )
        };
        let (before, after) = (
            Sources::parse(&text(10, 100)),
            Sources::parse(&text(30, 200)),
        );
        let all = [
            ("ttyS0", 3),
            ("virtio1-req.0", 22),
            ("LOC", 110),
            ("ERR", 3),
        ];
        let all = all.map(|(name, count)| (name.to_owned(), count));
        assert_eq!(before.0, all.into());
        let mut since = after.since(&before);
        let names: Vec<_> = since.0.iter().map(|(n, c)| (&n[..], *c)).collect();
        assert_eq!(names, [("LOC", 100), ("virtio1-req.0", 20)]);
        since.add(&since.clone());
        assert_eq!(since.rates(4.0)["LOC"], 50.0);
        assert_eq!(Sources::parse(""), Sources::default());
    }
}
