//! What the daemon makes of each real worker gone bad: a named error within the limit, and nobody left.

use std::time::{Duration, Instant};

use casemate_tests::DEADLINE;
use casemate_tests::misdeeds::{DEAF, MUTE, Outcome, PROGRESS, Step};
use casemate_tests::workers::{Bench, LIMITS, WORKERS, call};
use casemate_worker::confine::exit;
use casemate_worker::protocol::FailureKind;
use casemate_worker::spawn::{Limits, Progress, Worker, WorkerError};
use tokio::sync::watch;

const MISBEHAVE: &str = env!("CARGO_BIN_EXE_misbehave");
const POSSESS: &str = env!("CARGO_BIN_EXE_possess");

/// Enough for a start on a busy machine.
const SILENCE: Duration = Duration::from_secs(2);
const SHORT: Limits = Limits { time: Duration::from_secs(4), silence: SILENCE };
/// How much later than its limit a run may be over on such a machine.
const SLACK: Duration = Duration::from_secs(5);

const DONE: &str = "{\"event\":\"done\",\"result\":{\"errno\":0}}\n";

fn say(text: impl Into<String>) -> Step {
    Step::Say { text: text.into(), times: 1 }
}

/// One kind of worker, and a bench of its own.
struct Judge {
    bench: Bench,
    worker: Worker,
}

impl Judge {
    async fn judge(&self, steps: &[Step]) -> Result<Outcome, WorkerError> {
        self.judge_within(steps, SHORT).await
    }

    async fn judge_within(&self, steps: &[Step], limits: Limits) -> Result<Outcome, WorkerError> {
        let begin = Instant::now();
        let (_keep, cancel) = watch::channel(false);
        let outcome = self.bench.run_with(self.worker, steps, limits, &mut |_| (), cancel).await;
        let context = format!("{:?}, {:.200}", self.worker, format!("{steps:?}"));
        assert!(begin.elapsed() < limits.time + SLACK, "{context}: {:?}", begin.elapsed());
        assert_eq!(self.bench.processes(), [0; 0], "{context}: nobody is left when the run is over");
        let text = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
        assert!(!text.contains(char::is_control), "{context}: {text:?}");
        assert!(text.len() < 64 << 10, "{context}: {} bytes of error", text.len());
        outcome
    }
}

/// Of each of the four workers, side by side, since most of the time passes in waiting.
async fn each(test: impl AsyncFn(&Judge)) {
    let all = WORKERS.map(async |worker| {
        let judge = Judge { bench: Bench::possessed(MISBEHAVE, POSSESS).await, worker };
        test(&judge).await;
        judge.bench.end().await;
    });
    futures_util::future::join_all(all).await;
}

/// A worker of the tests' own, for what no single system call does.
async fn impostor(worker: Worker) -> Judge {
    Judge { bench: Bench::new(MISBEHAVE).await, worker }
}

#[tokio::test]
async fn nonsense() {
    let deep = format!("{{\"event\":\"done\",\"result\":{}0{}}}\n", "[".repeat(40_000), "]".repeat(40_000));
    let lines = [
        "rubbish\n",
        "\n",
        "\u{1b}[2J\u{1b}]0;owned\u{7}\r\u{202e}\n",
        "{}\n",
        "nothing\n",
        "[\"done\"]\n",
        "{\"event\":\"other\"}\n",
        "{\"event\":\"unshared\"}\n",
        "{\"event\":\"confined\",\"layers\":[]}\n",
        "{\"event\":\"done\"}\n",
        "{\"event\":\"done\",\"result\":{\"errno\":\"0\"}}\n",
        "{\"event\":\"done\",\"result\":{\"errno\":0,\"more\":0}}\n",
        "{\"event\":\"done\",\"result\":{\"errno\":2147483648}}\n",
        "{\"event\":\"done\",\"result\":{\"errno\":1e999}}\n",
        "{\"event\":\"done\",\"result\":[]}\n",
        "{\"event\":\"done\",\"event\":\"done\",\"result\":{}}\n",
        "{\"event\":\"progress\",\"bytes\":18446744073709551616,\"bytes_total\":0,\"items\":0,\"items_total\":0}\n",
        "{\"event\":\"progress\",\"bytes\":-1,\"bytes_total\":0,\"items\":0,\"items_total\":0}\n",
        "{\"event\":\"failed\",\"failure\":{\"kind\":\"mine\",\"subject\":\"\",\"message\":\"\"}}\n",
        deep.as_str(),
    ];
    each(async |judge| {
        for line in lines {
            let outcome = judge.judge_within(&[say(line), Step::Hang], LIMITS).await;
            assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{line:.80}: {outcome:?}");
        }
        // Half a line, and then the end.
        let outcome = judge.judge_within(&[say("{\"event\":\"do"), Step::Exit(0)], LIMITS).await;
        assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{outcome:?}");
    })
    .await;
}

#[tokio::test]
async fn numbers_as_large_as_they_come() {
    let Judge { bench, worker } = impostor(Worker::Index).await;
    let line = PROGRESS.replace(":1,", ":18446744073709551615,");
    let mut seen = Vec::new();
    let (_keep, cancel) = watch::channel(false);
    let steps = [say(line)];
    let outcome = bench.run_with(worker, &steps, LIMITS, &mut |now| seen.push(now.bytes), cancel).await;
    assert_eq!((outcome.expect("done"), seen), (Outcome { errno: 0 }, vec![u64::MAX]));
    bench.end().await;
}

#[tokio::test]
async fn more_after_the_last_word() {
    each(async |judge| {
        // Its own last word is the second one.
        let outcome = judge.judge_within(&[say(DONE)], LIMITS).await;
        assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{outcome:?}");
        let outcome = judge.judge_within(&[say(DONE), say(PROGRESS), Step::Hang], LIMITS).await;
        assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{outcome:?}");
        let outcome = judge.judge(&[say(DONE), Step::Hang]).await;
        assert!(matches!(outcome, Err(WorkerError::Silent { .. })), "{outcome:?}");
        let outcome = judge.judge_within(&[say(DONE), Step::Exit(9)], LIMITS).await;
        assert!(matches!(outcome, Err(WorkerError::Died { status, .. }) if status.code() == Some(9)));
        let outcome = judge.judge(&[say(DONE), Step::CloseEvents, Step::Hang]).await;
        assert!(matches!(outcome, Err(WorkerError::Died { .. })), "{outcome:?}");
        let outcome = judge.judge_within(&[say(DONE), Step::Exit(0)], LIMITS).await;
        assert_eq!(outcome.expect("an honest end"), Outcome { errno: 0 });
    })
    .await;
}

#[tokio::test]
async fn floods() {
    // However long a busy machine takes to write so much.
    let patient = Limits { time: DEADLINE, silence: DEADLINE };
    each(async |judge| {
        for (name, step) in [
            ("an endless line", Step::Say { text: "x".repeat(60_000), times: 0 }),
            ("endless events", Step::Say { text: PROGRESS.repeat(700), times: 0 }),
            ("endless logs", Step::Log { text: "y\n".repeat(2_000), times: 0 }),
        ] {
            let outcome = judge.judge_within(&[step], patient).await;
            assert!(matches!(outcome, Err(WorkerError::TooMuchOutput { .. })), "{name}: {outcome:?}");
        }
        // A long log alone is none.
        let talk = Step::Log { text: "z\n".repeat(1_000), times: 10 };
        let outcome = judge.judge_within(&[talk], LIMITS).await;
        assert_eq!(outcome.expect("a talker"), Outcome { errno: 0 });
    })
    .await;
}

#[tokio::test]
async fn hanging() {
    each(async |judge| {
        let outcome = judge.judge(&[Step::Hang]).await;
        assert!(matches!(outcome, Err(WorkerError::Silent { after, .. }) if after == SILENCE), "{outcome:?}");
        // Words without end are no work either.
        let outcome = judge.judge(&[Step::Drip]).await;
        assert!(matches!(outcome, Err(WorkerError::TimedOut { .. })), "{outcome:?}");
        // Nor are half a word and an open pipe.
        let outcome = judge.judge(&[say("{\"event\""), Step::Hang]).await;
        assert!(matches!(outcome, Err(WorkerError::Silent { .. })), "{outcome:?}");
    })
    .await;
    // More than a pipe holds, to a worker that reads nothing; and one that never comes to reading.
    let Judge { bench, worker } = impostor(Worker::Index).await;
    let long = [say("x".repeat(1 << 20))];
    for name in [DEAF, MUTE] {
        let outcome = bench.run_as(name, worker, &long, SHORT).await;
        assert!(
            matches!(outcome, Err(WorkerError::Silent { after, .. }) if after == SILENCE),
            "{name}: {outcome:?}"
        );
        assert_eq!(bench.processes(), [0; 0], "{name}");
    }
    bench.end().await;
}

async fn died(judge: &Judge, step: Step, code: u8, word: &str) {
    let outcome = judge.judge_within(&[say(PROGRESS), step.clone()], LIMITS).await;
    let Err(WorkerError::Died { status, .. }) = &outcome else { panic!("{step:?}: {outcome:?}") };
    assert_eq!(status.code(), Some(code.into()), "{step:?}");
    let text = outcome.expect_err("died").to_string();
    assert!(text.contains(word), "{step:?}: {text}");
}

#[tokio::test]
async fn dying_halfway() {
    each(async |judge| {
        died(judge, Step::Exit(0), 0, "exit status: 0").await;
        died(judge, Step::Exit(9), 9, "exit status: 9").await;
        let forbidden = call(libc::SYS_getppid, []);
        died(judge, forbidden, exit::SIGNAL + libc::SIGSYS as u8, "system call").await;
        // Its log is told.
        let log = Step::Log { text: "why: \u{1b}[31m\n".to_owned(), times: 1 };
        let outcome = judge.judge_within(&[log, Step::Exit(9)], LIMITS).await;
        assert!(outcome.expect_err("died").to_string().ends_with("why: \\u{1b}[31m"));
        // Who closes the pipe has said its last word, and lives no longer for it.
        let begin = Instant::now();
        let steps = [Step::CloseEvents, Step::Hang];
        let (_keep, cancel) = watch::channel(false);
        let outcome = judge.bench.run_with(judge.worker, &steps, SHORT, &mut |_| (), cancel).await;
        assert!(matches!(outcome, Err(WorkerError::Died { .. })), "{outcome:?}");
        assert!(begin.elapsed() < SHORT.time + SLACK);
        casemate_tests::wait_for("both processes to end", || judge.bench.processes().is_empty());
    })
    .await;
    for worker in WORKERS {
        let judge = impostor(worker).await;
        died(&judge, Step::Panic, exit::PANIC, "panicked").await;
        // PID 1 of its namespace is spared SIGABRT, so libc goes on to a privileged instruction.
        died(&judge, Step::Abort, exit::SIGNAL + libc::SIGSEGV as u8, "SIGSEGV").await;
        judge.bench.end().await;
    }
}

#[tokio::test]
async fn words_that_move_a_cursor() {
    let judge = impostor(Worker::Index).await;
    let words = "\\u001b[2J\\r\\n\\u202e'\\\"\\\\\\u0000";
    let line = format!(
        "{{\"event\":\"failed\",\"failure\":{{\"kind\":\"io\",\"subject\":\"{words}\",\"message\":\"{}\"}}}}\n",
        "long".repeat(200_000)
    );
    let outcome = judge.judge_within(&[say(line)], LIMITS).await;
    let Err(WorkerError::Failed { failure, .. }) = outcome else { panic!("{outcome:?}") };
    assert_eq!(failure.kind, FailureKind::Io);
    assert_eq!(failure.subject, "\\u{1b}[2J\\r\\n\\u{202e}'\"\\\\0");
    assert_eq!(failure.message.chars().count(), 4_097);
    judge.bench.end().await;
}

#[tokio::test]
async fn cancelled_it_is_gone() {
    each(async |Judge { bench, worker }| {
        let (cancel, cancelled) = watch::channel(false);
        let mut tell = |_: Progress| cancel.send(true).expect("listener");
        let begin = Instant::now();
        let steps = [say(PROGRESS), Step::Hang];
        let outcome = bench.run_with(*worker, &steps, LIMITS, &mut tell, cancelled).await;
        assert!(matches!(outcome, Err(WorkerError::Cancelled)), "{worker:?}: {outcome:?}");
        assert!(begin.elapsed() < SLACK, "{worker:?}: {:?}", begin.elapsed());
        assert_eq!(bench.processes(), [0; 0], "{worker:?}");
    })
    .await;
}
