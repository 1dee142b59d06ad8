//! What one step takes in a process of its own: peak memory and how busy the device is.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::CompareRequest;
use super::course::Course;
use super::ladder::{Setting, Way};
use super::speed::{self, Runner};
use super::subjects::{self, Subject};
use crate::engine::config::Emit;
use crate::experiment::ExperimentError;
use crate::experiment::optimize::file_error;
use crate::experiment::resources::{self, Seen};
use crate::inference::Device;
use crate::report::compare::ResourcesRecord;

/// How long a GPU is watched at least: it tells of the moment before a few times a second.
const WATCHED: Duration = Duration::from_secs(2);

/// A step that is to be measured alone; as text `way,batch,tiles,subject`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alone {
    pub(super) way: Way,
    pub(super) batch: usize,
    /// Tiles of a round.
    pub(super) tiles: usize,
    /// Its name.
    pub(super) subject: String,
}

impl fmt::Display for Alone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match self.way {
            Way::InMemory => "memory",
            Way::InTurn => "turn",
            Way::Overlapped => "overlapped",
        };
        write!(f, "{way},{},{},{}", self.batch, self.tiles, self.subject)
    }
}

impl FromStr for Alone {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no step");
        let mut parts = text.splitn(4, ',');
        let way = match parts.next() {
            Some("memory") => Way::InMemory,
            Some("turn") => Way::InTurn,
            Some("overlapped") => Way::Overlapped,
            _ => return Err(wrong()),
        };
        let mut number = || parts.next()?.parse().ok().filter(|number: &usize| *number > 0);
        let (batch, tiles) = number().zip(number()).ok_or_else(wrong)?;
        let subject = parts.next().ok_or_else(wrong)?.to_owned();
        Ok(Self { way, batch, tiles, subject })
    }
}

/// Does one step in this process, which must have done nothing else, and says what it took.
///
/// # Errors
/// [`ExperimentError`] if the step can't be done.
pub fn alone(request: &CompareRequest, step: &Alone) -> Result<ResourcesRecord, ExperimentError> {
    let (subjects, _) = subjects::subjects(request)?;
    let Some(index) = subjects.iter().position(|subject| subject.name == step.subject) else {
        return Ok(ResourcesRecord::default());
    };
    let subject = &subjects[index];
    let setting = Setting { subject: index, batch: step.batch, way: step.way };
    let idle_bytes = resources::used_device_bytes(&[subject.device]);
    let Taken { cpu_secs, seconds, seen } = take(request, subject, setting, step.tiles, idle_bytes)?;
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    let device_utilisation = match subject.device {
        Device::Cpu => cpu_secs.map(|busy| (busy / (seconds * cores)).clamp(0.0, 1.0)),
        Device::Cuda { .. } => seen.mean_busy(),
    };
    Ok(ResourcesRecord {
        peak_host_bytes: resources::peak_host_bytes(),
        peak_device_bytes: seen.peak_bytes,
        device_utilisation,
    })
}

/// What rounds took once one had run.
struct Taken {
    /// Of all threads.
    cpu_secs: Option<f64>,
    seconds: f64,
    seen: Seen,
}

/// Rounds for as long as a GPU needs to tell how busy it is, after one that does not count.
fn take(
    request: &CompareRequest,
    subject: &Subject,
    setting: Setting,
    tiles: usize,
    idle_bytes: u64,
) -> Result<Taken, ExperimentError> {
    let timed = |round: &mut dyn FnMut() -> Result<(), ExperimentError>| {
        round()?;
        let (cpu, start) = (resources::cpu_secs(), Instant::now());
        let (ran, seen) = resources::watched_since(&[subject.device], idle_bytes, || {
            loop {
                round()?;
                if subject.device == Device::Cpu || start.elapsed() > WATCHED {
                    return Ok::<_, ExperimentError>(start.elapsed().as_secs_f64());
                }
            }
        });
        let cpu_secs = resources::cpu_secs().zip(cpu).map(|(after, before)| after - before);
        Ok(Taken { cpu_secs, seconds: ran?, seen })
    };
    match (&request.slide, setting.way) {
        (Some(path), Way::InTurn | Way::Overlapped) => {
            let course = Course::new(path, &subject.card, tiles)?;
            let out = tempfile::tempdir().map_err(|source| file_error(&std::env::temp_dir(), "written", source))?;
            let mut runner = Runner::open(subject, setting, course.config(Emit::Csv), request)?;
            timed(&mut || runner.round(&course, &out))
        }
        _ => {
            let set = crate::experiment::tiles::TileSet::synthetic(subject.card.tile_size, tiles.min(64), super::SEED);
            let (slices, batches) = (set.slices(), tiles.div_ceil(setting.batch));
            let mut session = subject.open()?;
            timed(&mut || Ok(speed::predict(&mut session, &slices, setting.batch, batches)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_told_to_another_process() {
        let step = Alone { way: Way::Overlapped, batch: 8, tiles: 100, subject: "a, b/fp32".to_owned() };
        assert_eq!(step.to_string().parse(), Ok(step));
        for wrong in ["", "memory", "memory,0,1,a", "memory,1,1", "fly,1,1,a"] {
            assert!(wrong.parse::<Alone>().is_err(), "{wrong:?}");
        }
    }
}
