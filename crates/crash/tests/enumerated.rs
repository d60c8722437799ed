//! Every crash of some runs of all workloads: the fast part of what `make soak` does for long.

use crash::Case;
use crash::judge::Judge;
use crash::states::Bounds;

/// Seeds of each case.
const SEEDS: std::ops::Range<u64> = 1..2;

fn survives(workload: &str) {
    let judge = Judge::default();
    for case in Case::of(workload) {
        for seed in SEEDS {
            match case.enumerate(seed, &Bounds::FAST, &judge) {
                Ok(looked) => println!("{case}, seed {seed}: {looked:?}"),
                Err(what) => panic!("{what}"),
            }
        }
    }
}

macro_rules! workloads {
    ($($test:ident: $workload:literal,)*) => {
        $(#[test]
        fn $test() {
            survives($workload);
        })*

        #[test]
        fn every_workload_has_its_test() {
            let tested = [$($workload),*];
            for case in Case::all() {
                assert!(tested.contains(&case.workload()), "{case}");
            }
        }
    };
}

workloads! {
    allocate: "allocate",
    refcounts: "refcounts",
    overwrite: "overwrite",
    pairs: "pairs",
    copy_on_write: "copy-on-write",
    qcow: "qcow",
    qed: "qed",
    vhd: "vhd",
    vdi: "vdi",
    vdi_growth: "vdi-growth",
    vhdx: "vhdx",
    vmdk: "vmdk",
    discard: "discard",
    zeroes: "zeroes",
    lazy: "lazy",
    lazy_growth: "lazy-growth",
    data_file: "data-file",
    encrypted: "encrypted",
    snapshots: "snapshots",
    resize: "resize",
    amend: "amend",
    bitmaps: "bitmaps",
    table_growth: "table-growth",
    growth: "growth",
    crashes: "crashes",
    chain: "chain",
    compressed: "compressed",
    convert: "convert",
    commit: "commit",
    commit_vhdx: "commit-vhdx",
    rebase: "rebase",
    rebase_compressed: "rebase-compressed",
    packed_in_place: "packed-in-place",
    link: "link",
    grow: "grow",
    one_cluster: "one-cluster",
    reuse: "reuse",
    repair: "repair",
    bitmaps_and_crashes: "bitmaps-and-crashes",
    snapshots_and_crashes: "snapshots-and-crashes",
    keys: "keys",
    preallocate: "preallocate",
    amend_and_crash: "amend-and-crash",
}
