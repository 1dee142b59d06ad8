//! Stages on bounded channels: threads, back-pressure, cancellation and timing; knows nothing of slides.
//!
//! ```text
//! source ──▶ [queue] ──▶ stage (1..n workers) ──▶ [queue] ──▶ … ──▶ fold (the calling thread)
//! ```
//!
//! Invariants: every queue is bounded, so memory is bounded by the queues' capacities. A stage's [`Stage::finish`] and
//! the end of [`Flow::fold`] are reached only when every item arrived; after a failure nobody flushes, so a truncated
//! result never looks complete. No thread outlives [`run`]. Every wait is measured as *starved* (no input) or *blocked*
//! (no room downstream); the rest of a worker's time is *busy*.

use std::any::Any;
use std::mem;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

/// A request to stop, shared between the threads of a run and whoever may ask (a signal handler).
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    asked: Arc<AtomicBool>,
    /// Requests that hold here too.
    above: Vec<Arc<AtomicBool>>,
}

impl Cancel {
    /// Asks to stop; takes effect at each worker's next item.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::Release);
    }

    /// A request to stop a part of the work; who asks to stop all of it means the part too.
    #[must_use]
    pub fn child(&self) -> Self {
        let above = self.above.iter().chain([&self.asked]).cloned().collect();
        Self { asked: Arc::default(), above }
    }

    /// Whether someone asked to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.above.iter().chain([&self.asked]).any(|asked| asked.load(Ordering::Acquire))
    }
}

/// One step of the work, run by one or more workers; each worker owns a value of the type.
pub trait Stage: Send {
    /// What arrives.
    type In: Send;
    /// What is sent on: any number of items for each that arrives.
    type Out: Send;
    /// Why the step can fail; a failure stops the whole run.
    type Error: Send;

    /// Handles one item.
    ///
    /// # Errors
    /// What went wrong; the run stops and reports the first such error.
    fn process(&mut self, item: Self::In, out: &mut Outlet<'_, Self::Out>) -> Result<(), Self::Error>;

    /// Sends on what is held back; called once per worker, and only if all input arrived.
    ///
    /// # Errors
    /// As [`Stage::process`].
    fn finish(&mut self, _out: &mut Outlet<'_, Self::Out>) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// Where a stage sends its results; waits while the next stage is full.
#[derive(Debug)]
pub struct Outlet<'a, T> {
    sender: &'a Sender<T>,
    blocked: Duration,
    /// The waits one by one, if they are traced.
    waits: Option<Vec<(Instant, Duration)>>,
    open: bool,
}

impl<'a, T> Outlet<'a, T> {
    fn new(sender: &'a Sender<T>, is_traced: bool) -> Self {
        Self { sender, blocked: Duration::ZERO, waits: is_traced.then(Vec::new), open: true }
    }

    /// Sends one item on. After the next stage has stopped, items are dropped: the run is failing already.
    pub fn send(&mut self, item: T) {
        let start = Instant::now();
        self.open &= self.sender.send(item).is_ok();
        let waited = start.elapsed();
        self.blocked += waited;
        if let Some(waits) = &mut self.waits {
            waits.push((start, waited));
        }
    }
}

/// Collects what every worker of a run did when; give it to [`run_traced`].
#[derive(Debug)]
pub struct Trace {
    begin: Instant,
    workers: Mutex<Vec<WorkerTrace>>,
}

/// What one worker did, in no particular order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerTrace {
    /// The stage's name.
    pub stage: &'static str,
    /// Its place in the line.
    pub stage_index: usize,
    /// What it did; [`Activity::Blocked`] lies within [`Activity::Busy`].
    pub spans: Vec<Span>,
}

/// A stretch of a worker's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// What it was spent on.
    pub activity: Activity,
    /// When it began, from the trace's begin.
    pub start: Duration,
    /// How long it took.
    pub length: Duration,
}

/// What a worker spends its time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Work on an item, waits downstream included.
    Busy,
    /// Waiting for input.
    Starved,
    /// Waiting for room downstream.
    Blocked,
}

impl Default for Trace {
    fn default() -> Self {
        Self { begin: Instant::now(), workers: Mutex::default() }
    }
}

impl Trace {
    /// The workers in the order of their stages.
    #[must_use]
    pub fn into_workers(self) -> Vec<WorkerTrace> {
        let mut workers = self.workers.into_inner().unwrap_or_else(PoisonError::into_inner);
        workers.sort_by_key(|worker| worker.stage_index);
        workers
    }

    fn span(&self, activity: Activity, start: Instant, length: Duration) -> Span {
        Span { activity, start: start.saturating_duration_since(self.begin), length }
    }

    fn add(&self, worker: WorkerTrace) {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
    }
}

/// Measures one worker.
struct Clock<'a> {
    stats: StageStats,
    trace: Option<&'a Trace>,
    spans: Vec<Span>,
}

impl<'a> Clock<'a> {
    fn new(name: &'static str, trace: Option<&'a Trace>) -> Self {
        Self { stats: StageStats::new(name, 1), trace, spans: Vec::new() }
    }

    fn timed<R>(&mut self, activity: Activity, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        let length = start.elapsed();
        match activity {
            Activity::Busy => self.stats.busy += length,
            Activity::Starved => self.stats.starved += length,
            Activity::Blocked => self.stats.blocked += length,
        }
        if let Some(trace) = self.trace {
            self.spans.push(trace.span(activity, start, length));
        }
        result
    }

    /// Adds the waits inside [`Outlet::send`], which were measured as busy.
    fn take_waits<T>(&mut self, outlet: Outlet<'_, T>) {
        self.stats.blocked = outlet.blocked;
        self.stats.busy = self.stats.busy.saturating_sub(outlet.blocked);
        if let Some(trace) = self.trace {
            let waits = outlet.waits.into_iter().flatten();
            self.spans.extend(waits.map(|(start, length)| trace.span(Activity::Blocked, start, length)));
        }
    }
}

/// What the workers of one stage did with their time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageStats {
    /// The stage's name.
    pub name: &'static str,
    /// Number of workers.
    pub workers: usize,
    /// Items that arrived (that were made, for a source).
    pub items: u64,
    /// Time at work, over all workers.
    pub busy: Duration,
    /// Time without input, over all workers.
    pub starved: Duration,
    /// Time without room downstream, over all workers.
    pub blocked: Duration,
}

impl StageStats {
    fn new(name: &'static str, workers: usize) -> Self {
        let zero = Duration::ZERO;
        Self { name, workers, items: 0, busy: zero, starved: zero, blocked: zero }
    }
}

/// Why a run ended early.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError<E> {
    /// A stage failed; the first one to do so.
    #[error("{source}")]
    Stage {
        /// The stage's name.
        stage: &'static str,
        /// Its error.
        source: E,
    },
    /// Someone asked to stop.
    #[error("stopped on request")]
    Cancelled,
    /// A worker panicked, which is a bug.
    #[error("stage {stage:?} panicked: {message}")]
    Panicked {
        /// The stage's name.
        stage: &'static str,
        /// What the panic said.
        message: String,
    },
}

/// The state that all threads of a run share.
struct Shared<'env, E> {
    trace: Option<&'env Trace>,
    cancel: Cancel,
    failed: AtomicBool,
    failure: Mutex<Option<PipelineError<E>>>,
    stats: Mutex<Vec<StageStats>>,
}

impl<E> Shared<'_, E> {
    fn is_stopping(&self) -> bool {
        self.failed.load(Ordering::Acquire) || self.cancel.is_cancelled()
    }

    /// Records a failure; only the first one is kept.
    fn fail(&self, error: PipelineError<E>) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    fn add(&self, index: usize, clock: Clock<'_>) {
        let worker = clock.stats;
        if let Some(trace) = self.trace {
            trace.add(WorkerTrace { stage: worker.name, stage_index: index, spans: clock.spans });
        }
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stage) = stats.get_mut(index) {
            stage.items += worker.items;
            stage.busy += worker.busy;
            stage.starved += worker.starved;
            stage.blocked += worker.blocked;
        }
    }

    fn register(&self, name: &'static str, workers: usize) -> usize {
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.push(StageStats::new(name, workers));
        stats.len() - 1
    }
}

/// Builds a line of stages inside [`run`].
#[derive(Clone)]
pub struct Line<'scope, 'env, E> {
    scope: &'scope Scope<'scope, 'env>,
    shared: Arc<Shared<'env, E>>,
}

/// A line that is being built: what comes out of its last stage.
pub struct Flow<'scope, 'env, T, E> {
    line: Line<'scope, 'env, E>,
    receiver: Receiver<T>,
}

/// Runs a line of stages to its end; `build` starts with [`Line::source`] and ends with [`Flow::fold`].
///
/// Returns the time that each stage spent, in the line's order.
///
/// # Errors
/// The first failure of any stage, a panic of a worker, or [`PipelineError::Cancelled`].
pub fn run<'env, E: Send + 'env>(
    cancel: &Cancel,
    build: impl for<'scope> FnOnce(Line<'scope, 'env, E>),
) -> Result<Vec<StageStats>, PipelineError<E>> {
    run_traced(cancel, None, build)
}

/// [`run`], with every stretch of every worker's time kept in `trace`.
///
/// # Errors
/// Those of [`run`].
pub fn run_traced<'env, E: Send + 'env>(
    cancel: &Cancel,
    trace: Option<&'env Trace>,
    build: impl for<'scope> FnOnce(Line<'scope, 'env, E>),
) -> Result<Vec<StageStats>, PipelineError<E>> {
    let shared = Arc::new(Shared {
        trace,
        cancel: cancel.clone(),
        failed: AtomicBool::new(false),
        failure: Mutex::new(None),
        stats: Mutex::new(Vec::new()),
    });
    thread::scope(|scope| build(Line { scope, shared: Arc::clone(&shared) }));
    let failure = shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
    match failure {
        Some(error) => Err(error),
        None if cancel.is_cancelled() => Err(PipelineError::Cancelled),
        None => Ok(mem::take(&mut *shared.stats.lock().unwrap_or_else(PoisonError::into_inner))),
    }
}

impl<'scope, 'env, E: Send + 'env> Line<'scope, 'env, E> {
    /// Starts the line with the items of an iterator; the time spent in `next` counts as starved.
    ///
    /// `capacity` bounds the queue behind it.
    pub fn source<T: Send + 'env>(
        self,
        name: &'static str,
        capacity: NonZeroUsize,
        items: impl Iterator<Item = T> + Send + 'env,
    ) -> Flow<'scope, 'env, T, E> {
        let (sender, receiver) = bounded(capacity.get());
        let index = self.shared.register(name, 1);
        let shared = Arc::clone(&self.shared);
        let mut items = items;
        self.scope.spawn(move || {
            guard(&shared, name, index, |clock| {
                let mut outlet = Outlet::new(&sender, shared.trace.is_some());
                while let Some(item) = clock.timed(Activity::Starved, || items.next()) {
                    if shared.is_stopping() || !outlet.open {
                        break;
                    }
                    clock.stats.items += 1;
                    outlet.send(item);
                }
                clock.take_waits(outlet);
                Ok(())
            });
        });
        Flow { line: self, receiver }
    }
}

impl<'scope, 'env, T: Send + 'env, E: Send + 'env> Flow<'scope, 'env, T, E> {
    /// Adds a stage with one worker for each element of `workers`; `capacity` bounds the queue behind it.
    #[must_use]
    pub fn through<S>(
        self,
        name: &'static str,
        capacity: NonZeroUsize,
        workers: Vec<S>,
    ) -> Flow<'scope, 'env, S::Out, E>
    where
        S: Stage<In = T, Error = E> + 'env,
        S::Out: 'env,
    {
        let (sender, receiver) = bounded(capacity.get());
        let index = self.line.shared.register(name, workers.len());
        for mut stage in workers {
            let (input, sender) = (self.receiver.clone(), sender.clone());
            let shared = Arc::clone(&self.line.shared);
            self.line.scope.spawn(move || {
                guard(&shared, name, index, |clock| {
                    let mut outlet = Outlet::new(&sender, shared.trace.is_some());
                    let ended = work_through(&shared, clock, &input, |item| stage.process(item, &mut outlet))?;
                    if let Ended::InputDone = ended {
                        clock.timed(Activity::Busy, || stage.finish(&mut outlet))?;
                    }
                    clock.take_waits(outlet);
                    Ok(())
                });
            });
        }
        Flow { line: self.line, receiver }
    }

    /// Ends the line on the calling thread: hands every item to `place`, then calls `finish` if all input arrived.
    pub fn fold(
        self,
        name: &'static str,
        mut place: impl FnMut(T) -> Result<(), E>,
        finish: impl FnOnce() -> Result<(), E>,
    ) {
        let Flow { line, receiver } = self;
        let index = line.shared.register(name, 1);
        guard(&line.shared, name, index, |clock| match work_through(&line.shared, clock, &receiver, &mut place)? {
            Ended::InputDone => clock.timed(Activity::Busy, finish),
            Ended::Stopped => Ok(()),
        });
    }
}

/// How a worker's loop came to its end.
enum Ended {
    InputDone,
    Stopped,
}

fn work_through<T, E>(
    shared: &Shared<'_, E>,
    clock: &mut Clock<'_>,
    input: &Receiver<T>,
    mut process: impl FnMut(T) -> Result<(), E>,
) -> Result<Ended, E> {
    loop {
        let received = clock.timed(Activity::Starved, || input.recv());
        // Asked after the wait: a failure upstream closes the queue, and that must not read as the end of the input.
        if shared.is_stopping() {
            return Ok(Ended::Stopped);
        }
        let Ok(item) = received else { return Ok(Ended::InputDone) };
        clock.stats.items += 1;
        clock.timed(Activity::Busy, || process(item))?;
    }
}

/// Runs one worker and turns its failure or panic into the run's.
///
/// `work` only borrows the worker's ends of the queues: they close after the failure is on record, so that no stage
/// downstream can take the closed queue for the end of the input.
fn guard<E>(
    shared: &Shared<'_, E>,
    name: &'static str,
    index: usize,
    work: impl FnOnce(&mut Clock<'_>) -> Result<(), E>,
) {
    let mut clock = Clock::new(name, shared.trace);
    match catch_unwind(AssertUnwindSafe(|| work(&mut clock))) {
        Ok(Ok(())) => {}
        Ok(Err(source)) => shared.fail(PipelineError::Stage { stage: name, source }),
        Err(panic) => shared.fail(PipelineError::Panicked { stage: name, message: message_of(panic.as_ref()) }),
    }
    shared.add(index, clock);
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();

    /// Passes numbers on, fails at one, panics at another; counts flushes.
    struct Pass<'a> {
        fail_at: Option<u64>,
        panic_at: Option<u64>,
        finished: &'a AtomicUsize,
    }

    impl Stage for Pass<'_> {
        type In = u64;
        type Out = u64;
        type Error = String;

        fn process(&mut self, item: u64, out: &mut Outlet<'_, u64>) -> Result<(), String> {
            if self.fail_at == Some(item) {
                return Err(format!("bad item {item}"));
            }
            assert!(self.panic_at != Some(item), "item {item} is cursed");
            out.send(item);
            Ok(())
        }

        fn finish(&mut self, _out: &mut Outlet<'_, u64>) -> Result<(), String> {
            self.finished.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    struct Outcome {
        result: Result<Vec<StageStats>, PipelineError<String>>,
        sum: u64,
        flushed: usize,
        folded: bool,
    }

    fn run_numbers(count: u64, fail_at: Option<u64>, panic_at: Option<u64>, cancel: &Cancel) -> Outcome {
        let (first, second) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (mut sum, mut folded) = (0, false);
        let worker = |finished| Pass { fail_at: None, panic_at: None, finished };
        let result = run(cancel, |line| {
            line.source("numbers", TWO, 0..count)
                .through("first", TWO, (0..3).map(|_| Pass { fail_at, panic_at, finished: &first }).collect())
                .through("second", TWO, vec![worker(&second)])
                .fold(
                    "sum",
                    |item| {
                        sum += item;
                        Ok(())
                    },
                    || {
                        folded = true;
                        Ok(())
                    },
                );
        });
        Outcome { result, sum, flushed: second.load(Ordering::SeqCst), folded }
    }

    #[test]
    fn everything_arrives_once_and_is_counted() {
        let outcome = run_numbers(1000, None, None, &Cancel::default());
        let stats = outcome.result.unwrap();
        assert_eq!(outcome.sum, 499_500);
        assert!(outcome.folded);
        assert_eq!(
            stats.iter().map(|stage| (stage.name, stage.workers, stage.items)).collect::<Vec<_>>(),
            [("numbers", 1, 1000), ("first", 3, 1000), ("second", 1, 1000), ("sum", 1, 1000)]
        );
    }

    #[test]
    fn a_trace_holds_every_stretch_of_every_worker() {
        let (trace, finished) = (Trace::default(), AtomicUsize::new(0));
        let (pass, traced) = (|| Pass { fail_at: None, panic_at: None, finished: &finished }, &trace);
        let stats: Vec<StageStats> = run_traced(&Cancel::default(), Some(traced), |line| {
            line.source("numbers", TWO, 0..100).through("pass", TWO, vec![pass(), pass()]).fold(
                "sum",
                |_| Ok(()),
                || Ok(()),
            );
        })
        .unwrap();
        let workers = trace.into_workers();
        assert_eq!(workers.iter().map(|worker| worker.stage).collect::<Vec<_>>(), ["numbers", "pass", "pass", "sum"]);
        let spans = |stage, activity| {
            let of = workers.iter().filter(move |worker| worker.stage == stage);
            of.flat_map(|worker| &worker.spans).filter(move |span| span.activity == activity)
        };
        // An item each, and the finish of each worker.
        assert_eq!(spans("pass", Activity::Busy).count(), 102);
        assert_eq!(spans("pass", Activity::Blocked).count(), 100);
        let total = |stage, activity| spans(stage, activity).map(|span| span.length).sum::<Duration>();
        let pass = &stats[1];
        assert_eq!(total("pass", Activity::Starved), pass.starved);
        assert_eq!(total("pass", Activity::Busy) - total("pass", Activity::Blocked), pass.busy);
    }

    #[test]
    fn nothing_flushes_after_a_failure() {
        // The race between a closing queue and the record of the failure is what is tested, so many times.
        for round in 0..200 {
            let outcome = run_numbers(100, Some(round % 100), None, &Cancel::default());
            let expected = PipelineError::Stage { stage: "first", source: format!("bad item {}", round % 100) };
            assert_eq!(outcome.result.unwrap_err(), expected);
            assert_eq!((outcome.flushed, outcome.folded), (0, false), "round {round}");
        }
    }

    #[test]
    fn nothing_flushes_after_a_panic() {
        for round in 0..20 {
            let outcome = run_numbers(100, None, Some(round), &Cancel::default());
            let PipelineError::Panicked { stage: "first", message } = outcome.result.unwrap_err() else {
                panic!("the panic was not reported as one");
            };
            assert_eq!(message, format!("item {round} is cursed"));
            assert_eq!((outcome.flushed, outcome.folded), (0, false), "round {round}");
        }
    }

    #[test]
    fn a_request_to_stop_ends_an_endless_run() {
        let cancel = Cancel::default();
        let asked = cancel.clone();
        let mut seen = 0;
        let result: Result<_, PipelineError<String>> = run(&cancel, |line| {
            line.source("numbers", TWO, 0u64..).fold(
                "count",
                |_| {
                    seen += 1;
                    if seen == 10 {
                        asked.cancel();
                    }
                    Ok(())
                },
                || panic!("a stopped run has no end"),
            );
        });
        assert_eq!(result.unwrap_err(), PipelineError::Cancelled);
    }

    #[test]
    fn a_request_to_stop_reaches_the_parts_and_not_the_whole() {
        let whole = Cancel::default();
        let (part, other) = (whole.child(), whole.child().child());
        part.cancel();
        assert_eq!([&whole, &part, &other].map(Cancel::is_cancelled), [false, true, false]);
        whole.cancel();
        assert!(other.is_cancelled());
    }

    #[test]
    fn a_slow_end_holds_back_the_source() {
        let made = AtomicUsize::new(0);
        let made = &made;
        let mut most = 0;
        let result: Result<_, PipelineError<String>> = run(&Cancel::default(), |line| {
            let items = (0..200u64).inspect(|_| {
                made.fetch_add(1, Ordering::SeqCst);
            });
            let finished = Box::leak(Box::new(AtomicUsize::new(0)));
            line.source("numbers", TWO, items)
                .through("pass", TWO, vec![Pass { fail_at: None, panic_at: None, finished }])
                .fold(
                    "slow",
                    |item| {
                        thread::sleep(Duration::from_micros(200));
                        most = most.max(made.load(Ordering::SeqCst) as u64 - item);
                        Ok(())
                    },
                    || Ok(()),
                );
        });
        let stats = result.unwrap();
        // Two queues of two, one item in each of the three pairs of hands, one being made, and the current one.
        assert!(most <= 9, "{most} items in flight");
        assert!(stats[1].blocked > Duration::from_millis(10), "{stats:?}");
    }
}
