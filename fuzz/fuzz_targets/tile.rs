//! Any bytes as a tile of any kind: the tile path alone.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| slidestream::slide::hostile::read_tile(bytes));
