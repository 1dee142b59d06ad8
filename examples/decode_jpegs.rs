//! Decodes JPEGs and does nothing else: the ceiling of a reader whose tiles are stored so.
//!
//! `cargo run --release --example decode_jpegs FILE THREADS`. The file holds one JPEG after the other, each behind its
//! length in four bytes, the lowest first, and a byte that is 1 if its components are R, G and B
//! (`benches/peers/stored_tiles.py` writes it). The decoder and its settings are the native reader's. Prints a line of JSON:
//! JPEGs, pixels, seconds and seconds of the CPU.

#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Jpeg<'a> {
    is_rgb: bool,
    data: &'a [u8],
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, threads] = &args[..] else { return Err("see the head of the source".into()) };
    let (bytes, threads): (Vec<u8>, usize) = (std::fs::read(file)?, threads.parse()?);
    let jpegs = split(&bytes)?;
    // Caches and pages as warm as a reader's are after its first tile.
    decode(jpegs.first().ok_or("no JPEG in the file")?, &mut Vec::new())?;
    let (start, cpu_before, next) = (Instant::now(), cpu_secs()?, AtomicUsize::new(0));
    let pixels = std::thread::scope(|scope| {
        let work = || {
            let (mut rgb, mut pixels) = (Vec::new(), 0);
            while let Some(jpeg) = jpegs.get(next.fetch_add(1, Ordering::Relaxed)) {
                decode(jpeg, &mut rgb)?;
                pixels += rgb.len() / 3;
            }
            Ok::<usize, Failure>(pixels)
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| "a thread panicked")?)
            .sum::<Result<usize, Failure>>()
    })?;
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_secs()? - cpu_before);
    let count = jpegs.len();
    println!(r#"{{"jpegs": {count}, "pixels": {pixels}, "s": {seconds}, "cpu": {cpu}}}"#);
    Ok(())
}

fn split(mut bytes: &[u8]) -> Result<Vec<Jpeg<'_>>, Failure> {
    let mut jpegs = Vec::new();
    while let [a, b, c, d, is_rgb, rest @ ..] = bytes {
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        let (data, later) = rest.split_at_checked(length).ok_or("a JPEG is cut off")?;
        jpegs.push(Jpeg { is_rgb: *is_rgb == 1, data });
        bytes = later;
    }
    Ok(jpegs)
}

fn decode(jpeg: &Jpeg<'_>, rgb: &mut Vec<u8>) -> Result<(), Failure> {
    let options = DecoderOptions::new_fast().set_strict_mode(true).jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(jpeg.data), options);
    decoder.decode_headers()?;
    if let (true, Some(stored)) = (jpeg.is_rgb, decoder.input_colorspace()) {
        decoder.set_options(options.jpeg_set_out_colorspace(stored));
    }
    rgb.resize(decoder.output_buffer_size().ok_or("no size")?, 0);
    Ok(decoder.decode_into(rgb)?)
}

/// Seconds of the CPU that this process has used, by Linux's count of a hundredth each.
fn cpu_secs() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(11) + ticks(12)) / 100.0)
}
