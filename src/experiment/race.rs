//! Times things against each other, fairly: in turns, warm-up apart, until the spread is small or the time is up.

use std::time::{Duration, Instant};

use crate::measure::Samples;

/// When a race ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RaceRules {
    /// Rounds that are not counted: memory grows and kernels are chosen in them.
    pub warm_up: usize,
    /// Rounds that are counted at least.
    pub least_rounds: usize,
    /// Spread of the medians below which more rounds tell nothing, as a share.
    pub tolerance: f64,
    /// No round starts after this.
    pub most_time: Duration,
}

/// How a race ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Race {
    /// Seconds of each contestant's turns; round `i` of one was next to round `i` of the others.
    pub seconds: Vec<Vec<f64>>,
    /// False if the time was up before the spread was small.
    pub is_stable: bool,
    /// How long it took, the warm-up included.
    pub duration: Duration,
}

/// What runs in a race: one turn is one call, which says how long it took.
pub type Contestant<'a, E> = Box<dyn FnMut() -> Result<Duration, E> + 'a>;

/// Does `work`, and says how long it took.
///
/// # Errors
/// Those of `work`.
pub fn timed<E>(work: impl FnOnce() -> Result<(), E>) -> Result<Duration, E> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// Runs all contestants in turns. Each round starts with another one, so that none always follows the same.
///
/// # Errors
/// The first contestant's that fails.
pub fn race<E>(contestants: &mut [Contestant<'_, E>], rules: RaceRules) -> Result<Race, E> {
    let start = Instant::now();
    let count = contestants.len();
    for _ in 0..rules.warm_up {
        contestants.iter_mut().try_for_each(|run| run().map(drop))?;
    }
    let mut seconds = vec![Vec::new(); count];
    let mut is_stable = false;
    for round in 0.. {
        if round >= rules.least_rounds {
            is_stable = seconds.iter().all(|seconds| is_settled(seconds, rules.tolerance));
            if is_stable || start.elapsed() >= rules.most_time {
                break;
            }
        }
        for turn in 0..count {
            let index = (round + turn) % count;
            seconds[index].push(contestants[index]()?.as_secs_f64());
        }
    }
    Ok(Race { seconds, is_stable, duration: start.elapsed() })
}

fn is_settled(seconds: &[f64], tolerance: f64) -> bool {
    Samples::new(seconds.to_vec()).is_some_and(|samples| samples.is_stable(tolerance))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn turns_alternate_and_warm_up_does_not_count() {
        let order = RefCell::new(String::new());
        let rules = RaceRules { warm_up: 1, least_rounds: 3, tolerance: 1e9, most_time: Duration::ZERO };
        let mut contestants: Vec<Contestant<'_, ()>> = vec![
            Box::new(|| {
                order.borrow_mut().push('a');
                Ok(Duration::from_secs(1))
            }),
            Box::new(|| {
                order.borrow_mut().push('b');
                Ok(Duration::from_secs(2))
            }),
        ];
        let race = race(&mut contestants, rules).unwrap();
        drop(contestants);
        assert_eq!(order.into_inner(), "ab".to_owned() + "ab" + "ba" + "ab");
        assert_eq!(race.seconds, [vec![1.0; 3], vec![2.0; 3]]);
    }

    #[test]
    fn a_failure_ends_the_race() {
        let rules = RaceRules { warm_up: 0, least_rounds: 2, tolerance: 0.0, most_time: Duration::ZERO };
        let mut turns = 0;
        let mut contestants: Vec<Contestant<'_, &str>> = vec![Box::new(|| {
            turns += 1;
            timed(|| if turns == 2 { Err("broke") } else { Ok(()) })
        })];
        assert_eq!(race(&mut contestants, rules).unwrap_err(), "broke");
    }
}
