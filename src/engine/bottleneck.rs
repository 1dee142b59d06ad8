//! What bounds a run, read off the times of its stages, and what would relieve it.

use std::time::Duration;

use crate::pipeline::StageStats;
use crate::report::ExecutionRecord;

/// Share of the cores' time from which they are what bounds a run.
const CORES_AT_WORK: f64 = 0.85;
/// Share of its workers' time from which a stage is at its limit.
const STAGE_AT_WORK: f64 = 0.7;

/// What bounds a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bottleneck {
    /// The stage, or the cores, and how that is known.
    pub(crate) what: String,
    /// What would relieve it, in the words of the settings.
    pub(crate) relief: String,
}

/// What bounded a run of these stages that took `duration` on a machine of so many cores.
pub(crate) fn of(stages: &[StageStats], duration: Duration, execution: &ExecutionRecord, cores: usize) -> Bottleneck {
    let seconds = duration.as_secs_f64().max(1e-9);
    let load = |stage: &StageStats| stage.busy.as_secs_f64() / (stage.workers.max(1) as f64 * seconds);
    // The source only waits.
    let working = || stages.iter().skip(1);
    let Some(busiest) = working().max_by(|a, b| load(a).total_cmp(&load(b))) else {
        return Bottleneck { what: String::new(), relief: String::new() };
    };
    let on_gpu = execution.device.starts_with("cuda");
    let computing = || working().filter(|stage| !on_gpu || stage.name != "infer");
    let busy: f64 = computing().map(|stage| stage.busy.as_secs_f64()).sum();
    let cores_load = busy / (cores as f64 * seconds);
    if cores_load >= CORES_AT_WORK
        && let Some(most) = computing().max_by(|a, b| a.busy.cmp(&b.busy))
    {
        let share = 100.0 * most.busy.as_secs_f64() / busy;
        let what = format!("the {cores} cores, at work all the time, {share:.0} % of it to {}", most.name);
        return Bottleneck { what, relief: format!("more cores, or {}", cheaper(most.name, on_gpu)) };
    }
    let what = format!("{} ({:.0} % busy over {} workers)", busiest.name, 100.0 * load(busiest), busiest.workers);
    let relief = match busiest.name {
        _ if load(busiest) < STAGE_AT_WORK => {
            "nothing was at work all the time: the slide is small, or other programs had the cores".to_owned()
        }
        "read" if execution.readers < cores => format!("more `readers` than {}", execution.readers),
        "infer" if on_gpu => format!("one more GPU, or {}", cheaper("infer", on_gpu)),
        "infer" if execution.sessions * execution.threads_per_session < cores => {
            format!("more `sessions` than {}", execution.sessions)
        }
        other => cheaper(other, on_gpu).to_owned(),
    };
    Bottleneck { what, relief }
}

/// What makes a stage's work less.
fn cheaper(stage: &str, on_gpu: bool) -> &'static str {
    match stage {
        "read" => "a coarser `target_mpp`, or less `overlap`",
        "infer" if on_gpu => "a faster variant (`optimize --for cuda`)",
        "infer" => "a faster variant (`optimize`), or a GPU",
        _ => "fewer kinds of output (`emit`)",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn stage(name: &'static str, workers: usize, busy: u64) -> StageStats {
        let zero = Duration::ZERO;
        StageStats { name, workers, items: 1, busy: Duration::from_secs(busy), starved: zero, blocked: zero }
    }

    fn execution(device: &str) -> ExecutionRecord {
        ExecutionRecord {
            device: device.to_owned(),
            provider: String::new(),
            reason: String::new(),
            placement: BTreeMap::new(),
            batch_size: 1,
            readers: 4,
            sessions: 2,
            threads_per_session: 1,
        }
    }

    #[test]
    fn the_stage_or_the_cores_are_named_with_what_relieves_them() {
        let of = |read: u64, infer: u64, write: u64, device: &str, cores: usize| {
            let stages =
                [stage("plan", 1, 0), stage("read", 4, read), stage("infer", 2, infer), stage("write", 1, write)];
            super::of(&stages, Duration::from_secs(10), &execution(device), cores)
        };
        let cases = [
            // Reading waits for nothing, and there are cores left.
            (of(36, 5, 1, "cpu", 8), "read (90 % busy over 4 workers)", "more `readers` than 4"),
            // All eight cores work, most of them read.
            (of(39, 20, 10, "cpu", 8), "the 8 cores, at work all the time, 57 % of it to read", "more cores, or"),
            (of(10, 19, 1, "cpu", 8), "infer (95 % busy over 2 workers)", "more `sessions` than 2"),
            // On a GPU inference takes no cores.
            (of(10, 19, 1, "cuda:0", 4), "infer (95 % busy over 2 workers)", "one more GPU"),
            (of(10, 5, 9, "cuda:0", 8), "write (90 % busy over 1 workers)", "fewer kinds of output (`emit`)"),
            (of(4, 1, 0, "cpu", 8), "read (10 % busy", "the slide is small"),
        ];
        for (found, what, relief) in cases {
            assert!(found.what.starts_with(what), "{found:?}");
            assert!(found.relief.contains(relief), "{found:?}");
        }
    }
}
