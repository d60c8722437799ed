//! Images exchanged with QEMU: a random image of any kind is changed by diskplane and by QEMU in turns, by guests'
//! requests and by whole-image commands. After each step both find it sound, say the same of it, and read what a
//! model says, in its snapshots too.
//!
//! `DISKPLANE_EXCHANGE_SEED` is the seed of the first image (a table of few unless set), `DISKPLANE_EXCHANGE_ROUNDS` how
//! many follow each other from there (1 unless set), `DISKPLANE_EXCHANGE_STEPS` how many changes each sees (3 unless set).

mod choice;
mod look;
mod model;
mod step;
mod world;

#[path = "../../../disk/tests/peer/mod.rs"]
mod peer;

use world::World;

/// A number from the environment.
fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text}"))
    })
}

fn round(seed: u64, steps: u64) {
    let mut world = World::new(seed, steps);
    world.look();
    for _ in 0..steps {
        while !world.step() {}
        world.look();
    }
}

/// One of each kind (see `Choice::any`), and such that QEMU need not measure what a key slot is to cost: that takes
/// it seconds.
const SEEDS: [u64; 8] = [5, 6, 7, 8, 10, 11, 17, 20];

#[test]
fn what_the_one_leaves_the_other_continues() {
    let steps = from_environment("DISKPLANE_EXCHANGE_STEPS", 3);
    let Ok(_) = std::env::var("DISKPLANE_EXCHANGE_SEED") else {
        SEEDS.iter().for_each(|seed| round(*seed, steps));
        return;
    };
    let first = from_environment("DISKPLANE_EXCHANGE_SEED", 1);
    let rounds = from_environment("DISKPLANE_EXCHANGE_ROUNDS", 1);
    for seed in first..first + rounds {
        round(seed, steps);
    }
}
