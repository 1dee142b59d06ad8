//! Vision transformers of many sizes, at every precision and batch size that is asked for.

use std::fmt;
use std::num::NonZeroUsize;

use super::sessions_busy;
use crate::experiment::ExperimentError;
use crate::measure::Bootstrap;
use crate::onnx::vit::{Pool, VitConfig, VitError};
use crate::report::Simulation;
use crate::report::bench::{Bench, BenchEntry, BenchKind, ScalingRecord};
use crate::report::compare::LeftOutRecord;

/// What the transformers' sizes are; every combination is meant.
#[derive(Clone, Debug)]
pub struct Axes {
    /// Width and height of the image in pixels.
    pub images: Vec<usize>,
    /// Width and height of a patch in pixels.
    pub patches: Vec<usize>,
    /// Channels of a token.
    pub dims: Vec<usize>,
    /// Blocks.
    pub depths: Vec<usize>,
    /// Attention heads.
    pub heads: Vec<usize>,
    /// Channels inside the MLP by those of a token.
    pub mlp_ratios: Vec<f64>,
    /// What becomes of the tokens.
    pub pools: Vec<Pool>,
}

/// One of what is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// The transformer.
    pub config: VitConfig,
    /// How it is called: a name that was given, else its description.
    pub model: String,
    /// `fp32`, `fp16` or `int8` as `optimize` makes it; `None` for as it is built.
    pub precision: Option<String>,
    /// Tiles per batch of one session; `None` for the device's own.
    pub batch_size: Option<NonZeroUsize>,
    /// Where it runs; `None` where all run on the same.
    pub device: Option<String>,
    /// On one device, or by one session, to tell what more of them bring.
    pub is_of_one: bool,
}

/// Devices that every case is measured on.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// In words; `None` if there is just one place.
    pub device: Option<String>,
    /// Devices, or sessions on a single one, if more than one was asked for.
    pub replicas: Option<usize>,
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct VitRequest {
    /// The transformers with their names.
    pub models: Vec<(String, VitConfig)>,
    /// Precisions; empty for as they are built.
    pub precisions: Vec<String>,
    /// Batch sizes; empty for the device's own.
    pub batch_sizes: Vec<NonZeroUsize>,
    /// Where; at least one.
    pub places: Vec<Place>,
    /// What can't be built, and why.
    pub skipped: Vec<LeftOutRecord>,
}

/// The transformers of all combinations, and those that there can't be, with the reason.
///
/// # Errors
/// [`VitError`] if a size is out of range by itself.
pub fn combinations(axes: &Axes) -> Result<(Vec<VitConfig>, Vec<LeftOutRecord>), VitError> {
    let mut all = vec![VitConfig::default()];
    vary(&mut all, &axes.images, |config, image| config.image = image);
    vary(&mut all, &axes.patches, |config, patch| config.patch = patch);
    vary(&mut all, &axes.dims, |config, dim| config.dim = dim);
    vary(&mut all, &axes.depths, |config, depth| config.depth = depth);
    vary(&mut all, &axes.heads, |config, heads| config.heads = heads);
    vary(&mut all, &axes.mlp_ratios, |config, mlp_ratio| config.mlp_ratio = mlp_ratio);
    vary(&mut all, &axes.pools, |config, pool| config.pool = pool);
    let (mut possible, mut skipped) = (Vec::new(), Vec::new());
    for config in all {
        match config.check() {
            Ok(()) => possible.push(config),
            Err(error @ (VitError::NotDivisible { .. } | VitError::Grid { .. })) => {
                skipped.push(LeftOutRecord { name: name_of(&config), why: error.to_string(), is_failure: false });
            }
            Err(error) => return Err(error),
        }
    }
    Ok((possible, skipped))
}

/// A short name that tells it from others: its preset's, or what differs from `vit_base_patch16_224`.
#[must_use]
pub fn name_of(config: &VitConfig) -> String {
    if let Some((name, _)) = VitConfig::presets().find(|(_, preset)| preset == config) {
        return name.to_owned();
    }
    let (own, usual) = (config.to_string(), VitConfig::default().to_string());
    let differs = |(own, usual): &(&str, &str)| own != usual;
    own.split(',').zip(usual.split(',')).filter(differs).map(|(own, _)| own).collect::<Vec<_>>().join(" ")
}

/// Replaces each by itself with every value in turn.
fn vary<T: Copy>(all: &mut Vec<VitConfig>, values: &[T], set: impl Fn(&mut VitConfig, T)) {
    let with = |config: &VitConfig, value: T| {
        let mut config = config.clone();
        set(&mut config, value);
        config
    };
    *all = all.iter().flat_map(|config| values.iter().map(|value| with(config, *value)).collect::<Vec<_>>()).collect();
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.model, self.precision.as_deref().unwrap_or("as built"))?;
        self.batch_size.map_or(Ok(()), |batch_size| write!(f, ", batch {batch_size}"))?;
        self.device.as_ref().map_or(Ok(()), |device| write!(f, ", {device}"))
    }
}

/// Measures every case by `simulate`, which runs one in a process of its own: memory is then its own too, and one that
/// does not fit ends no other. Those that fail are left out with the reason. `say` is told what is being done.
///
/// # Errors
/// [`ExperimentError::NothingMeasured`] if there is none that could be measured.
pub fn bench(
    request: &VitRequest,
    simulate: &mut dyn FnMut(&Case) -> Result<Simulation, String>,
    say: &mut dyn FnMut(&str),
) -> Result<Bench, ExperimentError> {
    let cases = cases(request);
    let (mut entries, mut skipped) = (Vec::new(), request.skipped.clone());
    for (index, (case, replicas)) in cases.iter().enumerate() {
        say(&format!("{} of {}: {case}", index + 1, cases.len()));
        let measured = simulate(case).and_then(|found| {
            let entry = entry(case, &found)?;
            let Some(replicas) = *replicas else { return Ok(entry) };
            say("the same on one");
            // The same batch for each, or it would be another measurement.
            let one = Case { batch_size: NonZeroUsize::new(entry.batch_size), is_of_one: true, ..case.clone() };
            let scaling = scaling(&entry, &simulate(&one)?, replicas);
            Ok(BenchEntry { scaling, ..entry })
        });
        match measured {
            Ok(entry) => entries.push(entry),
            Err(why) => skipped.push(LeftOutRecord { name: case.to_string(), why, is_failure: false }),
        }
    }
    if entries.is_empty() {
        let why = skipped.into_iter().map(|left| format!("{}: {}", left.name, left.why)).collect();
        return Err(ExperimentError::NothingMeasured { why });
    }
    let subject = match &request.models[..] {
        [(name, _)] => name.clone(),
        models => format!("{} vision transformers", models.len()),
    };
    Ok(Bench { kind: BenchKind::Vit, subject, lora_targets: Vec::new(), entries, skipped })
}

/// What the entries of a bench are called, where `batch_size` is the one that a device chooses.
#[must_use]
pub fn names(request: &VitRequest, batch_size: Option<NonZeroUsize>) -> Vec<String> {
    let of_case = |(case, _): (Case, _)| Case { batch_size: case.batch_size.or(batch_size), ..case }.to_string();
    cases(request).into_iter().map(of_case).collect()
}

/// Every case, and how many devices or sessions it runs on if they are several.
fn cases(request: &VitRequest) -> Vec<(Case, Option<usize>)> {
    let or_one = |empty: bool| if empty { 1 } else { 0 };
    let precisions = || {
        let named = request.precisions.iter().cloned().map(Some);
        named.chain((0..or_one(request.precisions.is_empty())).map(|_| None))
    };
    let batch_sizes = || {
        let given = request.batch_sizes.iter().copied().map(Some);
        given.chain((0..or_one(request.batch_sizes.is_empty())).map(|_| None))
    };
    let mut cases = Vec::new();
    for (model, config) in &request.models {
        for precision in precisions() {
            for batch_size in batch_sizes() {
                cases.extend(request.places.iter().map(|place| {
                    let (config, model, precision) = (config.clone(), model.clone(), precision.clone());
                    let device = place.device.clone();
                    (Case { config, model, precision, batch_size, device, is_of_one: false }, place.replicas)
                }));
            }
        }
    }
    cases
}

fn entry(case: &Case, found: &Simulation) -> Result<BenchEntry, String> {
    let point = found.points.first().ok_or("nothing was measured")?;
    let sessions = found.execution.sessions;
    let rate = point.tiles_per_sec;
    Ok(BenchEntry {
        // With its batch size also where that is the device's own choice.
        name: Case { batch_size: NonZeroUsize::new(point.batch_size), ..case.clone() }.to_string(),
        model: case.model.clone(),
        precision: case.precision.clone().unwrap_or_else(|| "as built".to_owned()),
        variant: found.model.variant.clone(),
        device: found.execution.device.clone(),
        provider: found.execution.provider.clone(),
        sessions,
        batch_size: point.batch_size,
        total_batch_size: point.batch_size * sessions,
        parameters: found.size.parameters,
        flops: found.size.flops,
        samples_per_sec: rate,
        ms_per_sample: 1e3 / rate.value,
        rounds_samples_per_sec: point.samples_tiles_per_sec.clone(),
        ratio: None,
        start_secs: Some(found.load_secs + found.first_batch_secs),
        peak_host_bytes: found.peak_host_bytes,
        peak_device_bytes: point.peak_device_bytes,
        utilisation: point.device_utilisation.or_else(|| sessions_busy(&point.stages)),
        utilisation_by_device: point.utilisation_by_device.clone(),
        is_stable: point.is_stable,
        lora: None,
        scaling: None,
    })
}

fn scaling(all: &BenchEntry, one: &Simulation, replicas: usize) -> Option<ScalingRecord> {
    let rounds_of_one = one.points.first()?.samples_tiles_per_sec.clone();
    let speedup = Bootstrap::default().unpaired_ratio(&rounds_of_one, &all.rounds_samples_per_sec)?;
    let efficiency = speedup.value / replicas as f64;
    Some(ScalingRecord { replicas, rounds_of_one, speedup: speedup.into(), efficiency })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use crate::report::PointRecord;
    use crate::report::compare::IntervalRecord;

    fn axes() -> Axes {
        Axes {
            images: vec![224],
            patches: vec![16],
            dims: vec![768],
            depths: vec![12],
            heads: vec![12],
            mlp_ratios: vec![4.0],
            pools: vec![Pool::Cls],
        }
    }

    #[test]
    fn combinations_are_the_product_less_what_cannot_be() {
        let axes = Axes { images: vec![224, 384], patches: vec![16, 14], pools: vec![Pool::Cls, Pool::Avg], ..axes() };
        let (possible, skipped) = combinations(&axes).unwrap();
        // 384 is no multiple of 14, with either pool.
        assert_eq!((possible.len(), skipped.len()), (6, 2));
        assert_eq!(skipped[0].why, "image=384 is no multiple of patch=14");
        assert_eq!(skipped[0].name, "image=384 patch=14");
        assert_eq!(name_of(&possible[0]), "vit_base_patch16_224");
        assert_eq!(name_of(&"vit_small_patch16_224,pool=avg".parse().unwrap()), "dim=384 heads=6 pool=avg");
        assert!(combinations(&Axes { depths: vec![12, 0], ..axes }).is_err(), "a depth that no ViT has is a mistake");
    }

    fn simulated(rate: f64) -> Simulation {
        let point = PointRecord {
            batch_size: 4,
            tiles_per_sec: IntervalRecord { value: rate, low: rate, high: rate },
            samples_tiles_per_sec: vec![rate; 6],
            ms_per_tile: None,
            flops_per_sec: 0.0,
            share_of_ceiling: None,
            peak_device_bytes: None,
            device_utilisation: None,
            utilisation_by_device: BTreeMap::new(),
            watts: None,
            is_stable: true,
            stages: Vec::new(),
        };
        let mut found = Simulation { points: vec![point], ..Simulation::default() };
        found.execution.sessions = 2;
        found
    }

    fn request() -> VitRequest {
        VitRequest {
            models: vec![("a".to_owned(), VitConfig::default()), ("b".to_owned(), VitConfig::default())],
            precisions: vec!["fp32".to_owned(), "int8".to_owned()],
            batch_sizes: Vec::new(),
            places: vec![Place { device: None, replicas: Some(2) }],
            skipped: Vec::new(),
        }
    }

    #[test]
    fn every_case_runs_at_every_place() {
        let places = [("cpu", None), ("cuda:0,cuda:1", Some(2))];
        let places = places.map(|(device, replicas)| Place { device: Some(device.to_owned()), replicas }).to_vec();
        let mut asked = Vec::new();
        let mut simulate = |case: &Case| {
            asked.push((case.device.clone().unwrap(), case.is_of_one));
            Ok(simulated(10.0))
        };
        let request = VitRequest { precisions: Vec::new(), places, ..request() };
        let found = bench(&request, &mut simulate, &mut |_| {}).unwrap();
        let names: Vec<&str> = found.entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names[..2], ["a, as built, batch 4, cpu", "a, as built, batch 4, cuda:0,cuda:1"]);
        let asked: Vec<(&str, bool)> = asked.iter().map(|(device, of_one)| (device.as_str(), *of_one)).collect();
        assert_eq!(asked[..3], [("cpu", false), ("cuda:0,cuda:1", false), ("cuda:0,cuda:1", true)]);
        assert_eq!((found.entries.len(), asked.len()), (4, 6));
    }

    #[test]
    fn every_case_is_measured_and_held_against_one() {
        let mut asked = Vec::new();
        let mut simulate = |case: &Case| {
            asked.push(format!("{case}{}", if case.is_of_one { " by one" } else { "" }));
            match case.model.as_str() {
                "b" if case.precision.as_deref() == Some("int8") => Err("it does not fit".to_owned()),
                _ => Ok(simulated(if case.is_of_one { 10.0 } else { 18.0 })),
            }
        };
        let found = bench(&request(), &mut simulate, &mut |_| {}).unwrap();
        assert_eq!(asked[..3], ["a, fp32", "a, fp32, batch 4 by one", "a, int8"]);
        let names: Vec<&str> = found.entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["a, fp32, batch 4", "a, int8, batch 4", "b, fp32, batch 4"]);
        let (entry, scaling) = (&found.entries[0], found.entries[0].scaling.as_ref().unwrap());
        assert_eq!((entry.batch_size, entry.sessions, entry.total_batch_size), (4, 2, 8));
        assert!((scaling.speedup.value - 1.8).abs() < 1e-12 && (scaling.efficiency - 0.9).abs() < 1e-12);
        assert_eq!((found.skipped[0].name.as_str(), found.skipped[0].why.as_str()), ("b, int8", "it does not fit"));
    }

    #[test]
    fn nothing_measured_is_an_error() {
        let error = bench(&request(), &mut |_| Err("no".to_owned()), &mut |_| {}).unwrap_err();
        assert!(error.to_string().starts_with("nothing could be measured: a, fp32: no; a, int8: no;"), "{error}");
    }
}
