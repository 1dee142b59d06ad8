//! Any bytes as a slide: the TIFF parser, then the tile path.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| slidestream::slide::hostile::read_file(bytes));
