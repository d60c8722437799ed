//! Builds that break a rule must be caught: tests of the tests.
//!
//! Each mutant is run on cases that are known to show it, with the bounds of the fast tests; and the same
//! cases without it find nothing (see `enumerated.rs`).

use crash::judge::Judge;
use crash::mutant::Mutant;
use crash::states::Bounds;
use crash::{Case, Injection};
use io::FaultOp;

/// Seeds that a mutant may take to be caught.
const SEEDS: std::ops::Range<u64> = 1..4;
/// As in errno(3).
const EIO: i32 = 5;

/// What catches the mutant on cases whose names contain `filter`.
fn caught(mutant: Mutant, filter: &str, judge: &Judge) -> Option<String> {
    let cases = Case::all();
    let cases = cases.iter().filter(|c| c.to_string().contains(filter));
    for case in cases {
        for seed in SEEDS {
            let found = match mutant {
                Mutant::FailureForgotten | Mutant::FailureCommitted => {
                    fails(case, seed, mutant, judge)
                }
                _ => case
                    .enumerate_mutant(seed, mutant, &Bounds::FAST, judge)
                    .err(),
            };
            if found.is_some() {
                return found;
            }
        }
    }
    None
}

/// With each write of a run failing, one after the other.
fn fails(case: &Case, seed: u64, mutant: Mutant, judge: &Judge) -> Option<String> {
    for skip in 0.. {
        let injection = Injection::once(0, FaultOp::Write, skip, EIO);
        match case.fail(seed, injection, Some(mutant), &Bounds::FEW, judge) {
            Ok(Some(_)) => {}
            Ok(None) => return None,
            Err(what) => return Some(what),
        }
    }
    None
}

#[test]
fn a_disk_that_ignores_two_barriers() {
    // Whoever asked for them, a flush or an edit: some crash shows it.
    let judge = Judge::default();
    let cases = Case::of("resize");
    let caught = (0..60).any(|skip| {
        let mut injection = Injection::once(0, FaultOp::Sync, skip, EIO);
        (injection.fault.count, injection.fault.lie) = (2, true);
        let found = cases[0].fail(1, injection, None, &Bounds::FEW, &judge);
        found.is_err()
    });
    assert!(caught, "no barrier of {} is needed", cases[0]);
}

macro_rules! mutants {
    ($($test:ident: $mutant:ident on $filter:literal,)*) => {
        $(#[test]
        fn $test() {
            let found = caught(Mutant::$mutant, $filter, &Judge::default());
            println!("{}", found.expect("a build like that must be caught"));
        })*

        #[test]
        fn every_mutant_has_its_test() {
            let tested = [$(Mutant::$mutant),*];
            assert!(Mutant::ALL.iter().all(|mutant| tested.contains(mutant)));
        }
    };
}

mutants! {
    a_barrier_left_out: BarrierLeftOut on "allocate/4k/",
    a_barrier_left_out_before_grain_tables: BarrierLeftOut on "vmdk/vmdk,8k,over",
    a_barrier_left_out_between_files: BarrierLeftOut on "vmdk/vmdk=split,4k",
    stages_in_the_wrong_order: OrderSwapped on "allocate/4k/",
    refcounts_after_the_entries: RefcountsLate on "allocate/4k/",
    entries_after_the_flush: EntriesLate on "allocate/4k/",
    a_flush_without_a_barrier: NoBarrier on "overwrite/",
    the_header_before_the_table: HeaderFirst on "table-growth/",
    a_commit_before_the_data: CommitBeforeData on "copy-on-write/64k",
    space_reused_before_the_flush: ReusedEarly on "discard/",
    the_rest_of_a_cluster_not_zeroed: RestNotZeroed on "junk",
    the_rest_of_a_cluster_not_copied: RestNotCopied on "copy-on-write/4k",
    the_dirty_bit_after_the_tables: DirtyBitLate on "lazy/4k,lazy_refcounts/",
    a_failed_flush_that_counts: FailureForgotten on "allocate/4k/",
    a_failed_write_that_counts: FailureCommitted on "copy-on-write/4k",
}
