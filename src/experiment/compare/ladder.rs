//! The steps from the original to everything together, and their rows.

use super::alone::Alone;
use super::speed::Timed;
use super::subjects::{BatchSize, Kind, Subject};
use crate::measure::{Bootstrap, Samples};
use crate::report::compare::{GateRecord, LadderRow, LeftOutRecord, RateRecord, ResourcesRecord};

/// How tiles get to the model and on from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// They lie in memory, and results are dropped.
    InMemory,
    /// They are read, inferred and stitched one after the other in one thread.
    InTurn,
    /// Reading, inferring and stitching overlap, as in a run.
    Overlapped,
}

/// What is timed: a subject with a batch and a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) subject: usize,
    pub(super) batch: usize,
    pub(super) way: Way,
}

/// The steps, and the settings that they need: steps that agree in one share its samples.
#[derive(Clone, Debug)]
pub(super) struct Ladder {
    steps: Vec<Step>,
    /// Of the model alone.
    pub(super) alone: Vec<Setting>,
    /// End to end; empty without a slide.
    pub(super) whole: Vec<Setting>,
}

#[derive(Clone, Debug)]
struct Step {
    name: String,
    subject: usize,
    batch: usize,
    /// Index in [`Ladder::alone`].
    alone: usize,
    /// Index in [`Ladder::whole`].
    whole: Option<usize>,
    note: Option<String>,
}

/// What was measured of a ladder.
pub(super) struct Measured<'a> {
    pub(super) model_only: &'a Timed,
    pub(super) end_to_end: Option<&'a Timed>,
    /// Of each step.
    pub(super) resources: Vec<Option<ResourcesRecord>>,
    pub(super) slide_tiles: Option<u64>,
}

impl Ladder {
    pub(super) fn new(subjects: &[Subject], batch: BatchSize, has_slide: bool) -> Self {
        let mut ladder = Self { steps: Vec::new(), alone: Vec::new(), whole: Vec::new() };
        let in_turn = has_slide.then_some(Way::InTurn);
        let overlapped = has_slide.then_some(Way::Overlapped);
        let original = "original: one tile at a time, read and infer in turn";
        ladder.add(original.to_owned(), 0, 1, in_turn, None);
        let note = (batch.batched == 1).then(|| "the model takes one tile at a time".to_owned());
        ladder.add("+ batching".to_owned(), 0, batch.batched, in_turn, note);
        let note = (batch.run < batch.batched)
            .then(|| format!("batches of {}, as a run takes them on this device, from here on", batch.run));
        if has_slide {
            ladder.add("+ overlapped stages".to_owned(), 0, batch.run, overlapped, note);
        }
        for (index, subject) in subjects.iter().enumerate().skip(1) {
            let name = match Kind::of(&subject.name) {
                Kind::Rewritten => "+ graph rewriting".to_owned(),
                Kind::Fp16 => "+ FP16".to_owned(),
                Kind::Int8 => "+ INT8".to_owned(),
                Kind::Other => format!("+ {}", subject.name),
            };
            ladder.add(name, index, batch.run, overlapped, None);
        }
        ladder
    }

    fn add(&mut self, name: String, subject: usize, batch: usize, way: Option<Way>, note: Option<String>) {
        let place = |settings: &mut Vec<Setting>, setting: Setting| {
            let known = settings.iter().position(|known| *known == setting);
            known.unwrap_or_else(|| {
                settings.push(setting);
                settings.len() - 1
            })
        };
        let alone = place(&mut self.alone, Setting { subject, batch, way: Way::InMemory });
        let whole = way.map(|way| place(&mut self.whole, Setting { subject, batch, way }));
        self.steps.push(Step { name, subject, batch, alone, whole, note });
    }

    /// What each step takes in a process of its own, over `tiles` tiles.
    pub(super) fn resources(
        &self,
        subjects: &[Subject],
        tiles: usize,
        in_own_process: &mut dyn FnMut(&Alone) -> Result<ResourcesRecord, String>,
        say: &mut dyn FnMut(&str),
    ) -> Vec<Option<ResourcesRecord>> {
        let mut known: Vec<(Setting, Option<ResourcesRecord>)> = Vec::new();
        let mut measure = |step: &Step| {
            let setting = step.whole.map_or(self.alone[step.alone], |whole| self.whole[whole]);
            if let Some((_, found)) = known.iter().find(|(of, _)| *of == setting) {
                return *found;
            }
            let subject = subjects[setting.subject].name.clone();
            let found = in_own_process(&Alone { way: setting.way, batch: setting.batch, tiles, subject })
                .inspect_err(|why| say(&format!("{}: its memory is not known: {why}", step.name)))
                .ok();
            known.push((setting, found));
            found
        };
        self.steps.iter().map(&mut measure).collect()
    }

    /// The rows, the last being the fastest step whose variant passes every gate; and the subject of that one.
    pub(super) fn rows(
        &self,
        subjects: &[Subject],
        measured: &Measured<'_>,
        gates: &[GateRecord],
        left_out: &[LeftOutRecord],
    ) -> (Vec<LadderRow>, usize) {
        let row = |(index, step): (usize, &Step)| self.row(subjects, measured, index, step);
        let mut rows: Vec<LadderRow> = self.steps.iter().enumerate().map(row).collect();
        let passes = |row: &LadderRow| gates.iter().all(|gate| gate.passed || gate.variant != row.variant);
        let speed = |row: &LadderRow| row.rate().map_or(0.0, |rate| rate.tiles_per_sec);
        let others = rows.iter().enumerate().skip(1).filter(|(_, row)| passes(row));
        let best = others.max_by(|(_, a), (_, b)| speed(a).total_cmp(&speed(b))).map_or(0, |(index, _)| index);
        let mut everything = LadderRow { name: "everything".to_owned(), ..rows[best].clone() };
        let gated = if gates.is_empty() { "" } else { " that passes every gate" };
        let mut notes = vec![format!("step {}, the fastest{gated}: its samples", best + 1)];
        let has = |kind| subjects.iter().any(|subject| Kind::of(&subject.name) == kind);
        let missing: Vec<&str> = [(Kind::Fp16, "FP16"), (Kind::Int8, "INT8")]
            .into_iter()
            .filter(|(kind, _)| !has(*kind) && !left_out.iter().any(|out| Kind::of(&out.name) == *kind))
            .map(|(_, name)| name)
            .collect();
        if !missing.is_empty() {
            notes.push(format!("no {} variant was given", missing.join(" or ")));
        }
        everything.note = Some(notes.join("; "));
        rows.push(everything);
        (rows, self.steps[best].subject)
    }

    fn row(&self, subjects: &[Subject], measured: &Measured<'_>, index: usize, step: &Step) -> LadderRow {
        let model_only = rate(measured.model_only, step.alone);
        let end_to_end = measured.end_to_end.zip(step.whole).and_then(|(timed, whole)| rate(timed, whole));
        let counts = end_to_end.as_ref().or(model_only.as_ref());
        let bottleneck = measured.end_to_end.zip(step.whole).map(|(timed, whole)| timed.bottlenecks[whole].clone());
        let resources = measured.resources.get(index).copied().flatten().unwrap_or_default();
        LadderRow {
            name: step.name.clone(),
            variant: subjects[step.subject].name.clone(),
            batch: step.batch,
            projected: counts.map(|rate| rate.projected(measured.slide_tiles)).unwrap_or_default(),
            bottleneck,
            peak_host_bytes: resources.peak_host_bytes,
            peak_device_bytes: resources.peak_device_bytes,
            device_utilisation: resources.device_utilisation,
            note: step.note.clone(),
            model_only,
            end_to_end,
        }
    }
}

/// The rate of a setting against the first one, which is the original's.
fn rate(timed: &Timed, index: usize) -> Option<RateRecord> {
    let (original, seconds) = (timed.seconds.first()?, timed.seconds.get(index)?);
    let speedup = Bootstrap::default().ratio(original, seconds);
    Some(RateRecord::new(&Samples::new(seconds.clone())?, speedup))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{BareModel, Device, ModelCard, Provider};
    use std::path::Path;
    use std::time::Duration;

    fn subjects(names: &[&str]) -> Vec<Subject> {
        let card = ModelCard::load(Path::new("models/cells-vit"), &BareModel::default()).unwrap();
        let variant = card.default_variant().unwrap().clone();
        let subject = |name: &&str| Subject {
            name: (*name).to_owned(),
            model: 0,
            card: card.clone(),
            variant: variant.clone(),
            device: Device::Cpu,
            provider: Provider::Cpu,
        };
        names.iter().map(subject).collect()
    }

    fn timed(medians: &[f64]) -> Timed {
        let rounds = |median: &f64| vec![*median; 8];
        Timed {
            seconds: medians.iter().map(rounds).collect(),
            bottlenecks: medians.iter().map(|_| "infer".to_owned()).collect(),
            is_stable: true,
            duration: Duration::ZERO,
        }
    }

    #[test]
    fn steps_share_what_they_have_in_common() {
        let ladder = Ladder::new(&subjects(&["fp32", "int8"]), BatchSize { run: 1, batched: 8 }, true);
        let names: Vec<&str> = ladder.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names[1..], ["+ batching", "+ overlapped stages", "+ INT8"]);
        // The original alone is the same in turn and overlapped.
        assert_eq!(ladder.alone.len(), 3);
        assert_eq!(ladder.whole.len(), 4);
        let without = Ladder::new(&subjects(&["fp32", "int8"]), BatchSize { run: 1, batched: 8 }, false);
        assert_eq!((without.steps.len(), without.whole.len()), (3, 0));
    }

    #[test]
    fn everything_is_the_fastest_step_that_passes() {
        let subjects = subjects(&["fp32", "fp32-rewritten", "int8"]);
        let ladder = Ladder::new(&subjects, BatchSize { run: 1, batched: 8 }, true);
        let (model_only, whole) = (timed(&[4.0, 4.0, 3.0, 1.0]), timed(&[5.0, 5.0, 3.0, 2.0, 1.0]));
        let measured = || Measured {
            model_only: &model_only,
            end_to_end: Some(&whole),
            resources: vec![None; 5],
            slide_tiles: Some(10),
        };
        let (rows, best) = ladder.rows(&subjects, &measured(), &[], &[]);
        assert_eq!((rows.len(), best, rows[5].variant.as_str()), (6, 2, "int8"));
        assert_eq!(rows[5].end_to_end.as_ref().unwrap().speedup.unwrap().value, 5.0);
        assert_eq!(rows[4].model_only.as_ref().unwrap().speedup.unwrap().value, 4.0);
        assert!(rows[5].note.as_ref().unwrap().contains("no FP16 variant"));
        let failed = GateRecord {
            variant: "int8".to_owned(),
            name: "mean cosine".to_owned(),
            bound: crate::report::compare::Bound::AtLeast,
            limit: 1.0,
            value: Some(0.9),
            passed: false,
            reason: String::new(),
        };
        let (rows, best) = ladder.rows(&subjects, &measured(), &[failed], &[]);
        assert_eq!((best, rows[5].variant.as_str()), (1, "fp32-rewritten"));
    }
}
