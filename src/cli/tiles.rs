//! `slidestream tiles`: the coordinates of a slide's tissue tiles, without a model.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::ValueEnum;
use slidestream::engine::cohort::OutputFolder;
use slidestream::engine::plan::{self, SlidePlan};
use slidestream::engine::{EngineError, inputs};
use slidestream::geometry::Overlap;
use slidestream::inference::{BareModel, ModelCard};
use slidestream::output::{self, Profile, TileCsvWriter};
use slidestream::slide::Slide;

use super::options::{TilingDefaults, TilingOptions};
use super::{Failure, Outcome, say, show};

/// Writes OUT/coords/ID.csv and OUT/coords/ID.h5, which CLAM and TRIDENT read and `run --coords` takes back
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Slides, folders (searched recursively) and lists (.csv with the columns slide[,mpp][,mask][,id])
    #[arg(required = true, value_name = "SLIDE|DIR|LIST.csv")]
    slides: Vec<PathBuf>,
    /// Where results go
    #[arg(long, short, value_name = "DIR", default_value = "slidestream-out")]
    out: PathBuf,
    /// Take tile size, resolution and overlap from this model
    #[arg(long, short, value_name = "DIR|CARD")]
    model: Option<PathBuf>,
    /// Side of a tile in pixels at the target resolution [default: the model's, or 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536), help_heading = "Tiles")]
    tile_size: Option<u32>,
    /// Whose meaning `patch_size` has in the HDF5 file
    #[arg(long, value_name = "NAME", default_value = "trident")]
    profile: ProfileName,
    #[command(flatten)]
    tiling: TilingOptions,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProfileName {
    Trident,
    Clam,
}

pub(super) fn execute(args: &Args) -> Result<Outcome, Failure> {
    let card = args.model.as_ref().map(|path| ModelCard::load(path, &BareModel::default())).transpose()?;
    let tiling = args.tiling.config(&TilingDefaults {
        tile_size: args.tile_size.or(card.as_ref().map(|card| card.tile_size)).unwrap_or(256),
        target_mpp: card.as_ref().map(|card| card.mpp),
        overlap: Overlap::Pixels(card.as_ref().map_or(0, |card| card.overlap)),
    })?;
    let mut slides = inputs::slides(&args.slides)?;
    if let Some(path) = args.tiling.mpp_csv()? {
        inputs::add_mpp(&mut slides, &path)?;
    }
    let folder = OutputFolder::lock(&args.out)?;
    let profile = match args.profile {
        ProfileName::Trident => Profile::Trident,
        ProfileName::Clam => Profile::Clam,
    };
    let mut failed = 0;
    for input in &slides {
        let tiling = input.tiling(&tiling);
        let planned =
            Slide::open(&input.path, tiling.reader).map_err(Into::into).and_then(|slide| plan::plan(slide, &tiling));
        match planned.and_then(|plan| write(&folder, &input.id, &plan, profile)) {
            Ok(line) => show(&line),
            Err(error) => {
                failed += 1;
                say(&format!("error: {}: {}", input.id, error.chain()));
                if let Some(hint) = error.hint() {
                    say(&format!("help: {hint}"));
                }
            }
        }
    }
    Ok(Outcome::of(failed, slides.len()))
}

fn write(folder: &OutputFolder, id: &str, plan: &SlidePlan, profile: Profile) -> Result<String, EngineError> {
    let coords = folder.path().join("coords");
    let csv_path = coords.join(format!("{id}.csv"));
    let mut csv = TileCsvWriter::create(&csv_path, &[])?;
    let mut corners = Vec::with_capacity(plan.positions.len());
    for position in &plan.positions {
        let rect = plan.plane.level0_rect(*position);
        csv.append(rect, &[])?;
        corners.push((rect.x, rect.y));
    }
    let attributes = output::TileAttributes { profile, ..plan.tile_attributes(id, &coords) };
    output::write_coords_h5(&coords.join(format!("{id}.h5")), &corners, &attributes)?;
    csv.finish()?;
    let mut line = format!("{id}  {} of {} tiles have tissue", corners.len(), plan.grid_tiles);
    if plan.unsampled_tiles > 0 {
        write!(line, ", {} not sampled", plan.unsampled_tiles).ok();
    }
    writeln!(line, "  {}", csv_path.display()).ok();
    Ok(line)
}
