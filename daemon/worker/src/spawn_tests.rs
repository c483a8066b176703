//! Any bytes from a worker end in an event or a named error, in bounded memory.

use proptest::prelude::*;

use super::*;
use crate::protocol::{FetchResult, PackagesIndex, ReleaseIndex, TreeResult, UnpackResult};

/// Lines as honest workers write them: what is near to them gets furthest into the parser.
const HONEST: &[&str] = &[
    r#"{"event":"unshared"}"#,
    r#"{"event":"confined","layers":["userns","seccomp"]}"#,
    r#"{"event":"progress","bytes":1,"bytes_total":2,"items":3,"items_total":4}"#,
    r#"{"event":"failed","failure":{"kind":"io","subject":"a \u001b","message":"b"}}"#,
    r#"{"event":"done","result":{"items":[{"from":0,"bytes":1}]}}"#,
    r#"{"event":"done","result":{"members":1,"bytes":2}}"#,
    r#"{"event":"done","result":{"known":1,"chosen":2,"bytes":3}}"#,
    r#"{"event":"done","result":{"tree":"ingested","digest":"00","entries":1,"bytes":2,"new_objects":3,"new_bytes":4}}"#,
    r#"{"event":"done","result":{"tree":"verified","entries":1,"bytes":2,"damage":["x"]}}"#,
];

fn sound<T: DeserializeOwned>(line: &[u8]) {
    match parse::<T>("worker", line) {
        Ok(Event::Failed { failure }) => {
            for words in [failure.subject, failure.message] {
                assert!(!words.contains(char::is_control), "{words:?}");
            }
        }
        Ok(_) => {}
        Err(WorkerError::Garbage { line, .. }) => {
            assert!(line.len() <= 4 * 200 && line.is_ascii() && !line.contains(char::is_control), "{line:?}");
        }
        Err(error) => panic!("{error}"),
    }
}

fn sound_as_any(line: &[u8]) {
    sound::<()>(line);
    sound::<FetchResult>(line);
    sound::<ReleaseIndex>(line);
    sound::<PackagesIndex>(line);
    sound::<UnpackResult>(line);
    sound::<TreeResult>(line);
}

/// Read all that comes until an end.
async fn judge(pieces: impl IntoIterator<Item = Vec<u8>>) -> (Result<usize, WorkerError>, Lines) {
    let (mut sender, pipe) = tokio::net::unix::pipe::pipe().expect("pipe");
    let mut lines = Lines::new(pipe);
    let write = async move {
        for piece in pieces {
            // The reader gives up early where it may.
            if sender.write_all(&piece).await.is_err() {
                break;
            }
        }
    };
    let read = async {
        let mut events = 0;
        loop {
            match lines.event::<UnpackResult>("worker").await {
                Ok(None) => break Ok(events),
                Ok(Some(_)) => events += 1,
                Err(error) => break Err(error),
            }
        }
    };
    // The writer of an endless stream stops being polled once the reader has its end.
    let outcome = tokio::select! {
        outcome = read => outcome,
        () = async { write.await; std::future::pending().await } => unreachable!(),
    };
    (outcome, lines)
}

fn wait<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(future)
}

#[test]
fn honest_lines_are_understood() {
    for line in HONEST {
        sound_as_any(line.as_bytes());
        for end in 0..line.len() {
            sound_as_any(&line.as_bytes()[..end]);
        }
    }
    assert!(parse::<FetchResult>("worker", HONEST[4].as_bytes()).is_ok());
    assert!(parse::<UnpackResult>("worker", HONEST[5].as_bytes()).is_ok());
    assert!(parse::<PackagesIndex>("worker", HONEST[6].as_bytes()).is_ok());
    assert!(parse::<TreeResult>("worker", HONEST[7].as_bytes()).is_ok());
    assert!(parse::<TreeResult>("worker", HONEST[8].as_bytes()).is_ok());
}

proptest! {
    #[test]
    fn any_line(line: Vec<u8>) {
        sound_as_any(&line);
    }

    #[test]
    fn nearly_honest_lines(
        which in 0..HONEST.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut line = HONEST[which].as_bytes().to_vec();
        for (at, byte) in changes {
            let at = at.index(line.len());
            line[at] = byte;
        }
        sound_as_any(&line);
    }

    #[test]
    fn any_stream(pieces in prop::collection::vec(prop_oneof![
        any::<Vec<u8>>(),
        (0..HONEST.len()).prop_map(|which| format!("{}\n", HONEST[which]).into_bytes()),
    ], 0..8)) {
        let honest = pieces.iter().all(|piece| piece.ends_with(b"}\n") || piece.is_empty());
        match wait(judge(pieces)).0 {
            Ok(_) => prop_assert!(honest),
            Err(WorkerError::Garbage { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn memory_is_bounded() {
    let endless = vec![vec![b'x'; 64 << 10]; 2 * EVENT_LINE_MAX / (64 << 10)];
    let (outcome, lines) = wait(judge(endless));
    assert!(matches!(outcome, Err(WorkerError::TooMuchOutput { .. })), "{outcome:?}");
    assert!(lines.total <= EVENT_LINE_MAX + (16 << 10), "{}", lines.total);
    assert!(lines.pending.capacity() <= 4 * EVENT_LINE_MAX, "{}", lines.pending.capacity());

    let line = format!("{}\n", HONEST[2]).into_bytes();
    let many = line.repeat(1_000);
    let count = 2 * OUTPUT_MAX / many.len();
    let (outcome, lines) = wait(judge(std::iter::repeat_n(many, count)));
    assert!(matches!(outcome, Err(WorkerError::TooMuchOutput { .. })), "{outcome:?}");
    assert!(lines.total <= OUTPUT_MAX + (16 << 10), "{}", lines.total);
    assert!(lines.pending.capacity() <= 1 << 20, "{}", lines.pending.capacity());
}
