//! What the daemon makes of a worker gone bad: a named error within the limit, and nobody left.

use std::time::{Duration, Instant};

use casemate_tests::DEADLINE;
use casemate_tests::misdeeds::{DEAF, MUTE, Outcome, PROGRESS, Step};
use casemate_tests::workers::{Bench, LIMITS, call};
use casemate_worker::confine::exit;
use casemate_worker::protocol::FailureKind;
use casemate_worker::spawn::{Limits, Progress, Worker, WorkerError};
use tokio::sync::watch;

const MISBEHAVE: &str = env!("CARGO_BIN_EXE_misbehave");

/// Enough for a start on a busy machine.
const SILENCE: Duration = Duration::from_secs(2);
const SHORT: Limits = Limits { time: Duration::from_secs(4), silence: SILENCE };
/// How much later than its limit a run may be over on such a machine.
const SLACK: Duration = Duration::from_secs(5);

const DONE: &str = "{\"event\":\"done\",\"result\":{\"errno\":0}}\n";

fn say(text: impl Into<String>) -> Step {
    Step::Say { text: text.into(), times: 1 }
}

async fn judge(bench: &Bench, steps: &[Step]) -> Result<Outcome, WorkerError> {
    judge_within(bench, steps, SHORT).await
}

async fn judge_within(bench: &Bench, steps: &[Step], limits: Limits) -> Result<Outcome, WorkerError> {
    let begin = Instant::now();
    let (_keep, cancel) = watch::channel(false);
    let outcome = bench.run_with(Worker::Index, steps, limits, &mut |_| (), cancel).await;
    assert!(begin.elapsed() < limits.time + SLACK, "{steps:?}: {:?}", begin.elapsed());
    assert_eq!(bench.processes(), [0; 0], "{steps:?}: nobody is left when the run is over");
    let text = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
    assert!(!text.contains(char::is_control), "{text:?}");
    assert!(text.len() < 64 << 10, "{} bytes of error", text.len());
    outcome
}

#[tokio::test]
async fn nonsense() {
    let bench = Bench::new(MISBEHAVE).await;
    let deep = format!("{{\"event\":\"done\",\"result\":{}0{}}}\n", "[".repeat(100_000), "]".repeat(100_000));
    for line in [
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
    ] {
        let outcome = judge(&bench, &[say(line), Step::Hang]).await;
        assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{line:.80}: {outcome:?}");
    }
    // Half a line, and then the end.
    let outcome = judge(&bench, &[say("{\"event\":\"do"), Step::Exit(0)]).await;
    assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{outcome:?}");
    bench.end().await;
}

#[tokio::test]
async fn numbers_as_large_as_they_come() {
    let bench = Bench::new(MISBEHAVE).await;
    let line = PROGRESS.replace(":1,", ":18446744073709551615,");
    let mut seen = Vec::new();
    let (_keep, cancel) = watch::channel(false);
    let steps = [say(line)];
    let outcome =
        bench.run_with(Worker::Index, &steps, LIMITS, &mut |now| seen.push(now.bytes), cancel).await;
    assert_eq!((outcome.expect("done"), seen), (Outcome { errno: 0 }, vec![u64::MAX]));
    bench.end().await;
}

#[tokio::test]
async fn more_after_the_last_word() {
    let bench = Bench::new(MISBEHAVE).await;
    // Its own last word is the second one.
    let outcome = judge(&bench, &[say(DONE)]).await;
    assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{outcome:?}");
    let outcome = judge(&bench, &[say(DONE), say(PROGRESS), Step::Hang]).await;
    assert!(matches!(outcome, Err(WorkerError::Garbage { .. })), "{outcome:?}");
    let outcome = judge(&bench, &[say(DONE), Step::Hang]).await;
    assert!(matches!(outcome, Err(WorkerError::Silent { .. })), "{outcome:?}");
    let outcome = judge(&bench, &[say(DONE), Step::Exit(9)]).await;
    assert!(matches!(outcome, Err(WorkerError::Died { status, .. }) if status.code() == Some(9)));
    let outcome = judge(&bench, &[say(DONE), Step::CloseEvents, Step::Hang]).await;
    assert!(matches!(outcome, Err(WorkerError::Died { .. })), "{outcome:?}");
    let outcome = judge(&bench, &[say(DONE), Step::Exit(0)]).await;
    assert_eq!(outcome.expect("an honest end"), Outcome { errno: 0 });
    bench.end().await;
}

#[tokio::test]
async fn floods() {
    let bench = Bench::new(MISBEHAVE).await;
    for (name, step) in [
        ("an endless line", Step::Say { text: "x".repeat(4_000), times: 0 }),
        ("endless events", Step::Say { text: PROGRESS.repeat(400), times: 0 }),
        ("endless logs", Step::Log { text: "y\n".repeat(2_000), times: 0 }),
    ] {
        // However long a busy machine takes to write so much.
        let outcome = judge_within(&bench, &[step], Limits { time: DEADLINE, silence: DEADLINE }).await;
        assert!(matches!(outcome, Err(WorkerError::TooMuchOutput { .. })), "{name}: {outcome:?}");
    }
    // A long log alone is none.
    let outcome = judge(&bench, &[Step::Log { text: "z\n".repeat(1_000), times: 10 }]).await;
    assert_eq!(outcome.expect("a talker"), Outcome { errno: 0 });
    bench.end().await;
}

#[tokio::test]
async fn hanging() {
    let bench = Bench::new(MISBEHAVE).await;
    let outcome = judge(&bench, &[Step::Hang]).await;
    assert!(matches!(outcome, Err(WorkerError::Silent { after, .. }) if after == SILENCE), "{outcome:?}");
    // Words without end are no work either.
    let outcome = judge(&bench, &[Step::Drip]).await;
    assert!(matches!(outcome, Err(WorkerError::TimedOut { .. })), "{outcome:?}");
    // Nor are half a word and an open pipe.
    let outcome = judge(&bench, &[say("{\"event\""), Step::Hang]).await;
    assert!(matches!(outcome, Err(WorkerError::Silent { .. })), "{outcome:?}");
    // More than a pipe holds, to a worker that reads nothing; and one that never comes to reading.
    let long = [say("x".repeat(1 << 20))];
    for name in [DEAF, MUTE] {
        let outcome = bench.run_as(name, Worker::Index, &long, SHORT).await;
        assert!(
            matches!(outcome, Err(WorkerError::Silent { after, .. }) if after == SILENCE),
            "{name}: {outcome:?}"
        );
        assert_eq!(bench.processes(), [0; 0], "{name}");
    }
    bench.end().await;
}

#[tokio::test]
async fn dying_halfway() {
    let bench = Bench::new(MISBEHAVE).await;
    for (step, code, word) in [
        (Step::Exit(0), 0, "exit status: 0"),
        (Step::Exit(9), 9, "exit status: 9"),
        (Step::Panic, exit::PANIC, "panicked"),
        // PID 1 of its namespace is spared SIGABRT, so libc goes on to a privileged instruction.
        (Step::Abort, exit::SIGNAL + libc::SIGSEGV as u8, "SIGSEGV"),
        (call(libc::SYS_getppid, []), exit::SIGNAL + libc::SIGSYS as u8, "system call"),
    ] {
        let outcome = judge(&bench, &[say(PROGRESS), step.clone()]).await;
        let Err(WorkerError::Died { status, .. }) = &outcome else { panic!("{step:?}: {outcome:?}") };
        assert_eq!(status.code(), Some(code.into()), "{step:?}");
        let text = outcome.expect_err("died").to_string();
        assert!(text.contains(word), "{step:?}: {text}");
    }
    // Its log is told.
    let log = Step::Log { text: "why: \u{1b}[31m\n".to_owned(), times: 1 };
    let outcome = judge(&bench, &[log, Step::Exit(9)]).await;
    assert!(outcome.expect_err("died").to_string().ends_with("why: \\u{1b}[31m"));
    // Who closes the pipe has said its last word, and lives no longer for it.
    let begin = Instant::now();
    let steps = [Step::CloseEvents, Step::Hang];
    let (_keep, cancel) = watch::channel(false);
    let outcome = bench.run_with(Worker::Index, &steps, SHORT, &mut |_| (), cancel).await;
    assert!(matches!(outcome, Err(WorkerError::Died { .. })), "{outcome:?}");
    assert!(begin.elapsed() < SHORT.time + SLACK);
    casemate_tests::wait_for("both processes to end", || bench.processes().is_empty());
    bench.end().await;
}

#[tokio::test]
async fn words_that_move_a_cursor() {
    let bench = Bench::new(MISBEHAVE).await;
    let words = "\\u001b[2J\\r\\n\\u202e'\\\"\\\\\\u0000";
    let line = format!(
        "{{\"event\":\"failed\",\"failure\":{{\"kind\":\"io\",\"subject\":\"{words}\",\"message\":\"{}\"}}}}\n",
        "long".repeat(200_000)
    );
    let outcome = judge(&bench, &[say(line)]).await;
    let Err(WorkerError::Failed { failure, .. }) = outcome else { panic!("{outcome:?}") };
    assert_eq!(failure.kind, FailureKind::Io);
    assert_eq!(failure.subject, "\\u{1b}[2J\\r\\n\\u{202e}'\"\\\\0");
    assert_eq!(failure.message.chars().count(), 4_097);
    bench.end().await;
}

#[tokio::test]
async fn cancelled_it_is_gone() {
    let bench = Bench::new(MISBEHAVE).await;
    for worker in casemate_tests::workers::WORKERS {
        let (cancel, cancelled) = watch::channel(false);
        let mut tell = |_: Progress| cancel.send(true).expect("listener");
        let begin = Instant::now();
        let steps = [say(PROGRESS), Step::Hang];
        let outcome = bench.run_with(worker, &steps, LIMITS, &mut tell, cancelled).await;
        assert!(matches!(outcome, Err(WorkerError::Cancelled)), "{worker:?}: {outcome:?}");
        assert!(begin.elapsed() < SLACK, "{worker:?}: {:?}", begin.elapsed());
        assert_eq!(bench.processes(), [0; 0], "{worker:?}");
    }
    bench.end().await;
}
