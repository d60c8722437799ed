//! What is done to which images.

/// A workload and the images that it is run on.
pub(crate) struct Workload {
    pub name: &'static str,
    /// See [`crate::script`].
    pub script: &'static str,
    /// See [`crate::spec::Spec`].
    pub images: &'static [&'static str],
    /// How it is driven: numbers of queues, 0 for the blocking driver.
    pub queues: &'static [usize],
}

/// All of them.
pub(crate) const WORKLOADS: &[Workload] = &[
    Workload {
        name: "allocate",
        script: "storm 30 discard=0 unmap=0; flush; storm 20; kill; storm 20 flush=3",
        images: &[
            "cluster_size=64k size=4M",
            "cluster_size=4k",
            "cluster_size=512 size=512k refcount_bits=64",
            "cluster_size=4k compat=0.10",
            "cluster_size=2M size=8M",
            "cluster_size=16k extended_l2",
            "cluster_size=4k junk=256k",
            "cluster_size=4k lazy_refcounts",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "refcounts",
        script: "storm 40 flush=4 len=16k; discard 0 256k; flush; storm 30 flush=4",
        images: &[
            "cluster_size=1k size=512k refcount_bits=1",
            "cluster_size=1k size=512k refcount_bits=2",
            "cluster_size=1k size=512k refcount_bits=4",
            "cluster_size=1k size=512k refcount_bits=8",
            "cluster_size=1k size=512k refcount_bits=32",
            "cluster_size=512 size=512k refcount_bits=64",
        ],
        queues: &[0, 3],
    },
    Workload {
        name: "overwrite",
        script: "write 0 256k; flush; storm 60 discard=0 unmap=0 zero=0 fua=4 flush=4 len=8k",
        images: &["cluster_size=4k size=256k", "cluster_size=64k size=256k"],
        queues: &[0, 2],
    },
    Workload {
        name: "pairs",
        script: "pairs 40 len=16k; kill; pairs 30 fua=4 discard=2; crash; pairs 30 read=4",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=64k backing",
            "cluster_size=16k extended_l2",
            "qed=2 cluster_size=4k",
            "vmdk=split cluster_size=4k",
        ],
        queues: &[1, 2],
    },
    Workload {
        name: "copy-on-write",
        script: "storm 60 flush=3; close; storm 30",
        images: &[
            "cluster_size=4k backing",
            "cluster_size=64k backing",
            "cluster_size=512 size=512k backing",
            "cluster_size=16k extended_l2 backing",
            "cluster_size=2M extended_l2 size=4M backing",
            "cluster_size=4k backing junk=512k",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "qed",
        script: "storm 40 flush=3 len=48k discard=2 unmap=2 zero=2; kill; storm 20 flush=3; crash; storm 20; close; storm 10",
        images: &[
            "qed=2 cluster_size=4k",
            "qed=1 cluster_size=4k size=5M",
            "qed cluster_size=64k size=4M",
            "qed=2 cluster_size=4k backing",
            "qed=4 cluster_size=16k over cluster_size=4k size=700k compressed over raw",
            "cluster_size=4k over qed=2 cluster_size=8k size=600k filled",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "qcow",
        script: "storm 40 flush=3 len=48k discard=2 unmap=2 zero=2; kill; storm 20 flush=3; crash; storm 20; close; storm 10",
        images: &[
            "qcow cluster_size=4k",
            "qcow cluster_size=4k size=5M",
            "qcow cluster_size=4k compressed",
            "qcow cluster_size=512 size=300k backing",
            "qcow cluster_size=512 size=200k compressed over cluster_size=4k size=170k compressed over raw",
            "cluster_size=4k size=512k over qcow cluster_size=4k size=300k compressed",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "vhd",
        script: "storm 40 flush=3 len=48k discard=2 unmap=2 zero=2; kill; storm 20 flush=3; crash; storm 20; close; storm 10",
        images: &[
            "vhd cluster_size=4k size=512k",
            "vhd cluster_size=64k",
            "vhd cluster_size=2M size=6M",
            "vhd=fixed size=512k",
            "vhd cluster_size=4k size=512k junk=64k",
            "vhd cluster_size=8k size=512k backing",
            "vhd cluster_size=64k over vhd cluster_size=4k over raw",
            "cluster_size=4k over vhd cluster_size=8k size=600k filled",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "vdi",
        script: "storm 40 flush=3 len=48k discard=2 unmap=2 zero=2; kill; storm 20 flush=3; crash; storm 20; close; \
                 storm 10; crash; check leaks; storm 10; resize 5M; storm 10",
        images: &[
            "vdi cluster_size=4k size=512k",
            "vdi cluster_size=64k junk=64k",
            "vdi cluster_size=1M size=4M",
            "vdi=static cluster_size=8k size=512k",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "vdi-growth",
        // Of a full disk the first blocks move behind what the map can have, until the map is where they were.
        script: "write 0 512k; flush; resize 12M; storm 10; crash; storm 5",
        images: &[
            "vdi cluster_size=4k size=512k",
            "vdi=static cluster_size=4k size=512k",
        ],
        queues: &[0],
    },
    Workload {
        name: "vhdx",
        script: "storm 30 flush=3 len=48k discard=2 unmap=2 zero=2; kill; storm 10 flush=3; crash; storm 10; close; storm 5",
        images: &[
            "vhdx cluster_size=1M size=3M",
            "vhdx cluster_size=1M size=3M over vhdx cluster_size=1M size=2M filled",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "vmdk",
        script: "storm 40 flush=3 len=48k discard=2 unmap=2 zero=2; kill; storm 20 flush=3; crash; storm 20; close; \
                 storm 10; crash; check leaks; storm 10",
        images: &[
            "vmdk cluster_size=4k",
            "vmdk=zeroed cluster_size=64k size=4M",
            "vmdk=zeroed+single cluster_size=4k size=2M junk=64k",
            "vmdk cluster_size=8k over vmdk=zeroed cluster_size=4k size=600k",
            "vmdk=zeroed cluster_size=4k over vmdk=single cluster_size=64k size=700k",
            "vmdk=split cluster_size=4k size=2M",
            "vmdk=zeroed+single+split cluster_size=16k",
            "cluster_size=4k over vmdk=split cluster_size=8k size=600k",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "discard",
        script: "write 0 256k; flush; storm 80 discard=6 unmap=6 flush=4 len=64k; discard 0 256k; storm 20",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=16k extended_l2",
            "cluster_size=4k size=512k backing",
            "cluster_size=1k size=256k refcount_bits=1",
        ],
        queues: &[0, 3],
    },
    Workload {
        name: "zeroes",
        script: "storm 70 zero=6 unmap=4 flush=3 len=48k",
        images: &[
            "cluster_size=4k backing",
            "cluster_size=64k extended_l2 backing",
            "cluster_size=16k compat=0.10 backing",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "lazy",
        script: "storm 30 discard=3 flush=3; kill; storm 20 flush=3; close; storm 20 unmap=3; discard 0 128k; flush; storm 10",
        images: &[
            "cluster_size=4k lazy_refcounts",
            "cluster_size=512 size=512k refcount_bits=64 lazy_refcounts",
            "cluster_size=64k lazy_refcounts backing",
            "cluster_size=16k extended_l2 lazy_refcounts",
            "cluster_size=4k lazy_refcounts data_file",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "lazy-growth",
        script: "write 0 1792k; flush; storm 4 write=20 flush=4 len=128k; write 1792k 640k; flush; discard 0 1M; flush; storm 8",
        images: &["cluster_size=512 size=3M refcount_bits=64 lazy_refcounts"],
        queues: &[0],
    },
    Workload {
        name: "data-file",
        script: "storm 50 flush=3; kill; storm 30",
        images: &[
            "cluster_size=4k data_file",
            "cluster_size=16k extended_l2 data_file backing",
            "cluster_size=64k data_file_raw",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "encrypted",
        script: "storm 40 flush=3; kill; storm 20",
        images: &[
            "cluster_size=16k size=512k luks",
            "cluster_size=4k size=512k luks backing",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "snapshots",
        script: "storm 25; snapshot-create a; storm 25; snapshot-create b; storm 15; snapshot-apply a; storm 20; \
                 snapshot-delete b; storm 10; snapshot-delete a; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=256k refcount_bits=64",
            "cluster_size=4k size=512k refcount_bits=4 backing",
            "cluster_size=4k size=512k lazy_refcounts",
            "cluster_size=16k extended_l2",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "resize",
        script: "storm 30; resize 1M; storm 20; resize 300k; storm 20; resize 5M; storm 20 len=128k; resize 512k; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=512k refcount_bits=64",
            "cluster_size=4k size=512k backing",
            "cluster_size=16k size=512k extended_l2",
            "cluster_size=4k size=512k lazy_refcounts backing",
            "cluster_size=4k size=512k data_file",
            "cluster_size=4k size=512k luks",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "amend",
        script: "storm 30; amend refcount_bits 64; storm 10; amend refcount_bits 1; storm 10; amend refcount_bits 16; \
                 storm 10; downgrade; storm 10; amend compat 3; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=256k backing",
        ],
        queues: &[0],
    },
    Workload {
        name: "bitmaps",
        script: "storm 10; bitmap-add a; storm 20; close; storm 10; bitmap-add b; storm 10; bitmap-disable a; \
                 storm 10; bitmap-merge b a; kill; storm 10; bitmap-remove a; storm 5",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=4k size=512k lazy_refcounts",
            "cluster_size=16k extended_l2 backing",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "table-growth",
        // 64 refcounts in a block, 64 blocks in a cluster of the table: it moves at 2 MiB.
        script: "write 0 1536k; flush; storm 20 write=20 flush=6 len=128k; write 1536k 1M; flush; storm 20 flush=4",
        images: &["cluster_size=512 size=4M refcount_bits=64"],
        queues: &[0, 2],
    },
    Workload {
        name: "growth",
        // The same in the middle of small writes, with what a snapshot shares, and L1 tables that move too.
        script: "write 0 900k; snapshot-create a; storm 30 len=96k flush=3; crash; storm 20 len=96k; resize 6M; \
                 storm 30 len=256k flush=2; crash; resize 12M; crash; storm 10 len=64k; snapshot-delete a; storm 10",
        images: &[
            "cluster_size=512 size=2M refcount_bits=64",
            "cluster_size=512 size=2M refcount_bits=64 over cluster_size=2k size=1M compressed",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "crashes",
        script: "storm 25; crash; storm 25; crash; storm 25 flush=3; crash; storm 20; close; storm 10",
        images: &[
            "cluster_size=64k",
            "cluster_size=4k lazy_refcounts",
            "cluster_size=4k backing lazy_refcounts",
            "cluster_size=1k size=512k refcount_bits=1",
            "cluster_size=16k extended_l2 backing",
            "cluster_size=4k data_file",
            "cluster_size=64k data_file_raw",
            "cluster_size=4k size=512k luks",
            "cluster_size=4k compat=0.10 backing",
            "cluster_size=2M extended_l2 size=8M backing junk=4M",
        ],
        queues: &[0, 3],
    },
    Workload {
        name: "chain",
        script: "storm 50 flush=3; crash; storm 30; close; storm 10",
        images: &[
            "cluster_size=4k over cluster_size=16k compressed over raw size=600k",
            "cluster_size=16k extended_l2 over cluster_size=4k size=700k compressed over raw size=1200k",
            "cluster_size=64k over cluster_size=512 size=1200k",
            "cluster_size=512 size=256k over cluster_size=64k extended_l2 size=100k zstd compressed over cluster_size=4k size=400k",
            "cluster_size=16k extended_l2 compressed over cluster_size=32k extended_l2 compressed",
            "cluster_size=4k data_file over cluster_size=16k extended_l2 size=500k",
            "cluster_size=16k luks over cluster_size=4k compressed",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "compressed",
        script: "storm 50 flush=3 len=8k; crash; storm 30; discard 0 200k; flush; storm 20",
        images: &[
            "cluster_size=4k compressed",
            "cluster_size=64k size=2M zstd compressed",
            "cluster_size=512 size=256k refcount_bits=64 compressed",
            "cluster_size=4k refcount_bits=1 compressed",
            "cluster_size=4k refcount_bits=2 compressed backing",
            "cluster_size=4k compat=0.10 compressed",
            "cluster_size=16k extended_l2 compressed",
            "cluster_size=2M size=8M compressed",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "convert",
        script: "storm 20; convert; crash; storm 30 flush=2; create; crash; storm 20 flush=2; convert; storm 10",
        images: &[
            "cluster_size=4k",
            "cluster_size=512 size=512k refcount_bits=64",
            "cluster_size=64k zstd over cluster_size=4k size=700k",
            "cluster_size=16k extended_l2 compressed",
        ],
        queues: &[0],
    },
    Workload {
        name: "commit",
        script: "storm 40; commit; crash; storm 20; commit; storm 10; close; storm 5",
        images: &[
            "cluster_size=4k size=512k over cluster_size=16k size=512k filled",
            "cluster_size=64k size=1M over raw size=300k",
            "cluster_size=16k extended_l2 size=512k over cluster_size=4k size=200k compressed over raw size=400k",
            "qed=2 cluster_size=4k size=512k over qed=2 cluster_size=8k size=300k filled",
            "qcow cluster_size=512 size=256k over qcow cluster_size=4k size=256k filled",
            "cluster_size=4k size=512k over vhd cluster_size=8k size=512k",
            "vhd cluster_size=8k size=512k over vhd cluster_size=4k size=512k filled",
            "vmdk cluster_size=4k size=512k over vmdk=zeroed+single cluster_size=4k size=512k filled",
            "cluster_size=4k size=512k data_file over cluster_size=512 size=256k",
        ],
        queues: &[0],
    },
    Workload {
        name: "rebase",
        script: "storm 20 len=64k; rebase 2; crash; storm 20; rebase; crash; storm 10",
        images: &[
            "cluster_size=4k size=512k over cluster_size=16k size=512k filled over raw size=700k",
            "cluster_size=64k size=1M over cluster_size=4k size=300k compressed over cluster_size=4k size=700k filled",
            "cluster_size=16k extended_l2 size=512k over cluster_size=4k size=600k filled over raw size=300k",
            "qed=2 cluster_size=4k size=512k over qed=2 cluster_size=8k size=300k filled over raw size=400k",
        ],
        queues: &[0],
    },
    Workload {
        name: "rebase-compressed",
        script: "storm 20 len=64k; rebase 2 compress; crash; storm 20; rebase none compress; crash; storm 10",
        images: &[
            "cluster_size=16k extended_l2 size=512k over cluster_size=4k size=600k filled over raw size=300k",
        ],
        queues: &[0],
    },
    Workload {
        name: "packed-in-place",
        script: "storm 10 len=16k; pack 30; crash; storm 20 flush=3 len=8k; pack 60; storm 10; pack 30; crash; discard 0 60k; \
                 pack 20; storm 10",
        images: &[
            "cluster_size=4k size=256k",
            "cluster_size=512 size=64k refcount_bits=64 lazy_refcounts",
            "cluster_size=4k size=256k refcount_bits=1",
            "cluster_size=16k size=512k extended_l2 refcount_bits=2 zstd compressed backing",
            "cluster_size=4k size=200k compat=0.10 compressed backing",
        ],
        queues: &[0],
    },
    Workload {
        name: "commit-vhdx",
        script: "storm 10 len=64k; commit; storm 5; close",
        images: &["vhdx cluster_size=1M size=3M over vhdx cluster_size=1M size=2M filled"],
        queues: &[0],
    },
    Workload {
        name: "link",
        script: "storm 20 len=64k; link 20; crash; storm 5; link 300; crash; storm 10; rebase; crash; rebase; link none; crash; storm 10",
        images: &[
            "vhd cluster_size=8k size=512k over vhd cluster_size=4k size=400k filled",
            "vhd cluster_size=64k size=512k backing",
            "vhdx cluster_size=1M size=2M over vhdx cluster_size=1M size=1M filled",
            "vmdk cluster_size=4k size=512k over vmdk=zeroed+single cluster_size=4k size=400k filled",
            "vmdk=zeroed cluster_size=4k size=512k over vmdk cluster_size=8k size=512k",
        ],
        queues: &[0],
    },
    Workload {
        name: "grow",
        script: "storm 30; resize 1M; crash; storm 20; resize 5M; crash; storm 20 len=128k; close; storm 5",
        images: &[
            "qed=2 cluster_size=4k size=512k",
            "qed=1 cluster_size=4k size=512k over raw size=3M",
            "vhd cluster_size=8k size=512k",
            "vhd=fixed size=512k",
            "vhd cluster_size=4k size=512k junk=64k",
        ],
        queues: &[0],
    },
    Workload {
        name: "one-cluster",
        script: "storm 100 in=32k len=8k flush=3 fua=3 discard=3 unmap=2 zero=2 read=4; crash; storm 60 in=32k len=4k",
        images: &[
            "cluster_size=64k",
            "cluster_size=64k backing",
            "cluster_size=16k size=64k extended_l2 backing",
            "cluster_size=2M size=2M extended_l2 junk=4M",
            "cluster_size=2M size=2M compressed",
            "cluster_size=64k size=64k luks",
            "cluster_size=64k data_file_raw",
        ],
        queues: &[4],
    },
    Workload {
        name: "reuse",
        // Clusters go from one place to another all the time.
        script: "write 0 128k; flush; storm 120 in=256k len=48k discard=8 unmap=6 flush=5; crash; \
                 storm 60 in=256k len=64k discard=8 flush=5",
        images: &[
            "cluster_size=4k size=256k",
            "cluster_size=16k size=256k extended_l2 junk=512k",
            "cluster_size=4k size=256k backing",
            "cluster_size=4k size=256k lazy_refcounts",
            "cluster_size=4k size=256k luks",
            "cluster_size=2M size=16M junk=8M",
        ],
        queues: &[0, 3],
    },
    Workload {
        name: "repair",
        script: "storm 30; repair; crash; storm 20; snapshot-create a; storm 10; repair; crash; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=256k refcount_bits=64",
            "cluster_size=1k size=256k refcount_bits=2 backing",
            "cluster_size=16k extended_l2 compressed",
            "cluster_size=4k size=512k lazy_refcounts",
        ],
        queues: &[0],
    },
    Workload {
        name: "bitmaps-and-crashes",
        script: "bitmap-add a; crash; storm 20; crash; bitmap-add b; storm 20; close; bitmap-clear b; crash; storm 10; \
                 close; bitmap-disable b; crash; bitmap-merge b a; crash; storm 5; bitmap-remove b; crash; storm 5",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=16k extended_l2 backing",
            "cluster_size=512 size=256k refcount_bits=64",
            "cluster_size=4k data_file",
            "cluster_size=4k luks",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "snapshots-and-crashes",
        script: "storm 20; snapshot-create a; crash; storm 20; snapshot-create b; storm 20; crash; snapshot-apply b; \
                 crash; storm 20; resize 1M; storm 10; snapshot-apply b; crash; storm 10; snapshot-delete a; crash; \
                 storm 10; snapshot-delete b; crash; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=256k refcount_bits=64",
            "cluster_size=4k size=512k refcount_bits=8 compressed",
            "cluster_size=16k size=512k extended_l2 compressed backing",
            "cluster_size=16k size=512k luks",
            "cluster_size=4k size=512k lazy_refcounts",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "keys",
        script: "storm 10; key-add; crash; storm 5; key-erase; crash; storm 5",
        images: &["cluster_size=4k size=256k luks", "raw size=64k luks"],
        queues: &[0],
    },
    Workload {
        name: "preallocate",
        script: "storm 10; resize 1M metadata; crash; storm 20; resize 1536k falloc; crash; storm 10; resize 1600k full; \
                 crash; resize 600k; crash; storm 10; resize 2M metadata; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=512k refcount_bits=64",
            "cluster_size=16k size=512k extended_l2",
            "cluster_size=4k size=512k over raw size=1M",
            "cluster_size=4k size=512k data_file",
            "cluster_size=64k size=512k data_file_raw",
            "cluster_size=4k size=512k lazy_refcounts",
        ],
        queues: &[0],
    },
    Workload {
        name: "amend-and-crash",
        script: "storm 20; amend refcount_bits 64; crash; storm 10; amend refcount_bits 16; crash; amend lazy_refcounts on; \
                 storm 10; crash; amend lazy_refcounts off; downgrade; crash; storm 10; amend compat 3; crash; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=256k compressed",
        ],
        queues: &[0],
    },
];
