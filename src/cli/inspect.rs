//! `slidestream inspect`: what a slide is and how a model would read it.

use std::path::PathBuf;

use serde_json::{Value, json};
use slidestream::engine::config::{Emit, TilingConfig};
use slidestream::engine::plan::{self, SlidePlan};
use slidestream::geometry::{Overlap, PixelSize};
use slidestream::inference::{BareModel, ModelCard, Task};
use slidestream::slide::Slide;

use super::options::{TilingDefaults, TilingOptions};
use super::{Failure, Outcome, show};

/// Shows levels, resolution, compression and tiles; with a model also how it would read the slide
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// The slide
    #[arg(value_name = "SLIDE")]
    slide: PathBuf,
    /// The model that would read it
    #[arg(long, short, value_name = "DIR|CARD")]
    model: Option<PathBuf>,
    /// Side of a tile in pixels at the target resolution [default: the model's, or 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536), help_heading = "Tiles")]
    tile_size: Option<u32>,
    #[command(flatten)]
    tiling: TilingOptions,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let card = args.model.as_ref().map(|path| ModelCard::load(path, &BareModel::default())).transpose()?;
    let slide = Slide::open(&args.slide, args.tiling.reader()?)?;
    let slide_mpp = args.tiling.slide_mpp()?.map(PixelSize::square);
    let pixel_size = slide.pixel_size(slide_mpp);
    let mut facts = describe(&slide, pixel_size.as_ref().ok());
    match pixel_size {
        // The slide is worth showing even if no model can read it without its resolution.
        Err(error) => {
            facts.push(("mpp", json!(null), error.hint().map_or(error.to_string(), |h| format!("{error} ({h})"))))
        }
        Ok(pixel_size) => {
            let tiling = args.tiling.config(&TilingDefaults {
                tile_size: args.tile_size.or(card.as_ref().map(|card| card.tile_size)).unwrap_or(256),
                // Without a model the slide is looked at as it was scanned.
                target_mpp: Some(card.as_ref().map_or(pixel_size.x, |card| card.mpp)),
                overlap: Overlap::Pixels(card.as_ref().map_or(0, |card| card.overlap)),
            })?;
            let plan = plan::plan(slide, &tiling)?;
            facts.extend(describe_plan(&plan, &tiling));
            if let Some(card) = &card {
                let bytes = estimated_bytes(&plan, card);
                let text = bytes.iter().map(|(kind, bytes)| format!("{} {}", kind.as_str(), megabytes(*bytes)));
                let value: serde_json::Map<String, Value> =
                    bytes.iter().map(|(kind, bytes)| (kind.as_str().to_owned(), json!(bytes))).collect();
                facts.push(("estimated_output_bytes", json!(value), text.collect::<Vec<_>>().join(", ")));
            }
        }
    }
    if args.json {
        // The lines of the single levels are in the list of levels already.
        let facts = facts.into_iter().filter(|(name, ..)| *name != "level");
        let object: serde_json::Map<String, Value> = facts.map(|(name, value, _)| (name.to_owned(), value)).collect();
        show(&format!("{:#}\n", Value::Object(object)));
    } else {
        show(&super::columns(facts.into_iter().map(|(name, _, text)| (name, text))));
    }
    Ok(Outcome::Done)
}

/// A fact for machines and for people.
type Fact = (&'static str, Value, String);

fn describe(slide: &Slide, pixel_size: Option<&PixelSize>) -> Vec<Fact> {
    let extent = slide.extent();
    let levels: Vec<(Value, String)> = (0..)
        .zip(&slide.levels)
        .map(|(index, level): (usize, _)| {
            let size = pixel_size.and_then(|size| size.scaled(level.downsample_x, level.downsample_y));
            let mpp = size.map(|size| [size.x.get(), size.y.get()]);
            let tile =
                level.native_tile.map(|(width, height)| format!(", tiles {width} × {height}")).unwrap_or_default();
            let text = format!(
                "{index}: {} × {} px, 1/{:.4}{}{tile}",
                level.width,
                level.height,
                level.downsample_x,
                mpp.map(|mpp| format!(", {:.4} µm/px", mpp[0])).unwrap_or_default()
            );
            let value = json!({
                "level": index, "width": level.width, "height": level.height,
                "downsample": [level.downsample_x, level.downsample_y], "mpp": mpp, "native_tile": level.native_tile,
            });
            (value, text)
        })
        .collect();
    let icc = slide.icc_profile().ok().flatten();
    let mut facts: Vec<Fact> = vec![
        ("slide", json!(slide.path), slide.path.display().to_string()),
        ("vendor", json!(slide.vendor), slide.vendor.clone()),
        ("dimensions", json!([extent.width, extent.height]), format!("{} × {} px", extent.width, extent.height)),
        ("levels", levels.iter().map(|(value, _)| value.clone()).collect(), levels.len().to_string()),
    ];
    facts.extend(levels.into_iter().map(|(value, text)| ("level", value, text)));
    let compression = slide.compression.clone();
    facts.push(("reader", json!(slide.reader.as_str()), slide.reader.as_str().to_owned()));
    facts.push(("reader_reason", json!(slide.reader_reason), slide.reader_reason.clone()));
    facts.push(("compression", json!(compression), compression.unwrap_or_else(|| "unknown".to_owned())));
    let objective = slide.objective_power;
    let objective_text = objective.map_or_else(|| "unknown".to_owned(), |power| format!("{power}×"));
    facts.push(("objective_power", json!(objective), objective_text));
    let icc_text = icc.as_ref().map_or_else(|| "none".to_owned(), |profile| format!("{} bytes", profile.len()));
    facts.push(("icc_profile_bytes", json!(icc.map(|profile| profile.len())), icc_text));
    facts.push(("associated_images", json!(slide.associated_images), slide.associated_images.join(", ")));
    if let Some(size) = pixel_size {
        let text = format!("{} × {} µm/px", size.x, size.y);
        facts.push(("mpp", json!([size.x.get(), size.y.get()]), text));
    }
    facts
}

fn describe_plan(plan: &SlidePlan, tiling: &TilingConfig) -> Vec<Fact> {
    let choice = &plan.choice;
    let tissue = plan.grid_tiles - plan.background_tiles;
    vec![
        ("read_level", json!(choice.level.0), choice.to_string()),
        (
            "resampled",
            json!(choice.resample.is_some()),
            if choice.resample.is_some() { "yes" } else { "no" }.to_owned(),
        ),
        ("requested_mpp", json!(choice.requested.get()), format!("{} µm/px", choice.requested)),
        (
            "effective_mpp",
            json!([choice.effective.x.get(), choice.effective.y.get()]),
            format!("{:.4} × {:.4} µm/px", choice.effective.x.get(), choice.effective.y.get()),
        ),
        (
            "tile_size",
            json!({ "pixels": tiling.tile_size, "overlap": tiling.overlap }),
            format!("{} px, overlap {} px", tiling.tile_size, tiling.overlap),
        ),
        ("grid_tiles", json!(plan.grid_tiles), plan.grid_tiles.to_string()),
        ("tissue_tiles", json!(tissue), tissue.to_string()),
    ]
}

/// About how large each kind of output will be: rows of text by their usual length, maps by what deflate usually makes
/// of them.
fn estimated_bytes(plan: &SlidePlan, card: &ModelCard) -> Vec<(Emit, u64)> {
    let tiles = plan.positions.len() as u64;
    let classes = card.classes.len() as u64;
    let stride = u64::from(plan.plane.tile_size - plan.overlap);
    let pixels = plan.plane.width() * plan.plane.height();
    let share = tiles as f64 / plan.grid_tiles.max(1) as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate of a positive number")]
    let of_tissue = |bytes: f64| (bytes * share) as u64;
    let csv = (Emit::Csv, 60 + tiles * (24 + 12 * classes));
    let geojson = (Emit::GeoJson, tiles * (330 + 36 * classes));
    let png = (Emit::Png, 6_000_000);
    match card.task {
        // A quarter of a byte per pixel and class; a third more for the pyramid.
        Task::Segmentation => {
            vec![csv, geojson, (Emit::Tiff, of_tissue((classes + 1) as f64 * pixels as f64 * 0.25 * 1.33)), png]
        }
        Task::Classification => {
            vec![csv, geojson, (Emit::Tiff, (classes + 1) * (2_000 + pixels / (stride * stride))), png]
        }
        Task::Features => vec![csv, geojson, png],
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
