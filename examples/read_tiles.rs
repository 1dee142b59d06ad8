//! Reads the tiles of a list from a slide's finest level and says how long that took: reading alone, without a model.
//!
//! `cargo run --release --example read_tiles SLIDE TILES.csv SIZE THREADS auto|native|openslide` after
//! `native/setup.sh`. The list has a line `x,y` for each tile, its upper left corner in level-0 pixels. Prints a line of
//! JSON: tiles, seconds, seconds of the CPU, and a checksum over every 16th row and column.

#![expect(clippy::print_stdout, reason = "an example shows its result")]

use std::fs::read_to_string;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use slidestream::geometry::{Level0Rect, PixelSize, TilePlane, TilePosition};
use slidestream::slide::{ReadOptions, Slide, TileReader, level};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [slide, list, size, threads, reader] = &args[..] else { return Err("see the head of the source".into()) };
    let (size, threads): (u32, usize) = (size.parse()?, threads.parse()?);
    let reader = if reader == "auto" { None } else { Some(reader.parse()?) };
    let slide = Slide::open(slide, reader)?;
    let pixel_size = slide.pixel_size(None)?;
    let choice = level::choose(&slide.levels, pixel_size, pixel_size.x, 0.05);
    let tiles = positions(&read_to_string(list)?, slide.extent(), pixel_size, size)?;

    let options = ReadOptions { tile_size: size, icc: false };
    let readers = TileReader::several(&slide, &choice, options, &tiles, threads)?;
    let (start, cpu_before, next) = (Instant::now(), cpu_secs()?, AtomicUsize::new(0));
    let sum = std::thread::scope(|scope| {
        let work = |mut reader: TileReader| {
            let (mut rgb, mut sum) = (Vec::new(), 0);
            while let Some(tile) = tiles.get(next.fetch_add(1, Ordering::Relaxed)) {
                reader.read(*tile, &mut rgb)?;
                sum += checksum(&rgb, size as usize);
            }
            Ok::<u64, Failure>(sum)
        };
        let workers: Vec<_> = readers.into_iter().map(|reader| scope.spawn(move || work(reader))).collect();
        workers.into_iter().map(|worker| worker.join().map_err(|_| "a thread panicked")?).sum::<Result<u64, Failure>>()
    })?;
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_secs()? - cpu_before);
    let name = slide.reader.as_str();
    let count = tiles.len();
    println!(r#"{{"reader": "{name}", "tiles": {count}, "s": {seconds}, "cpu": {cpu}, "checksum": {sum}}}"#);
    Ok(())
}

fn positions(list: &str, extent: Level0Rect, pixel_size: PixelSize, size: u32) -> Result<Vec<TilePosition>, Failure> {
    let plane = TilePlane { region: extent, downsample_x: 1.0, downsample_y: 1.0, pixel_size, tile_size: size };
    let position = |line: &str| {
        let (x, y) = line.split_once(',').ok_or("a line that is not x,y")?;
        Ok(plane.position_at_level0(x.trim().parse()?, y.trim().parse()?))
    };
    list.lines().map(position).collect()
}

fn checksum(rgb: &[u8], side: usize) -> u64 {
    let rows = rgb.chunks_exact(side * 3).step_by(16);
    rows.flat_map(|row| row.chunks_exact(3).step_by(16)).flatten().map(|value| u64::from(*value)).sum()
}

/// Seconds of the CPU that this process has used, by Linux's count of a hundredth each.
fn cpu_secs() -> Result<f64, Failure> {
    let stat = read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(11) + ticks(12)) / 100.0)
}
