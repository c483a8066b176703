//! What the daemon and an init of another version say to each other. `protocol-N.jsonl` is what was said in version N, one
//! document a line; files of versions that may still run stay as they are.

use casemate_sandbox::control::{Exec, ExitStatus, Notice, Reply, Request, Size};
use serde_json::Value;

const SECOND: &str = include_str!("protocol-2.jsonl");

fn lines(kind: &str) -> Vec<Value> {
    let all = SECOND.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let found: Vec<Value> = all.filter(|value| value.get(kind).is_some()).collect();
    assert!(!found.is_empty(), "no {kind}");
    found
}

fn exec(session: u64, command: &[&str]) -> Exec {
    Exec {
        session,
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        login: false,
        environment: vec![],
        directory: "/srv".into(),
        directory_optional: false,
        root: true,
        terminal: Some(Size { rows: 24, columns: 80 }),
    }
}

/// Init refuses what it does not know: so what needs nothing new must look as it did.
#[test]
fn an_init_of_version_2_understands_us() {
    let first = Exec {
        environment: vec!["PATH=/bin".into()],
        directory: "/home/ann".into(),
        directory_optional: true,
        root: false,
        terminal: None,
        ..exec(7, &["id", "-u"])
    };
    let ours = [
        Request::Hello,
        Request::Exec(first),
        Request::Exec(exec(8, &["/bin/bash", "-l"])),
        Request::Signal { session: 7, signal: 15 },
        Request::Linger { on: true },
        Request::Stop { timeout_ms: 10_000 },
        Request::Watch,
    ];
    let ours: Vec<Value> = ours.iter().map(|request| serde_json::to_value(request).expect("JSON")).collect();
    assert_eq!(ours, lines("request"));
}

#[test]
fn we_understand_an_init_of_version_2() {
    let read = |value: Value| serde_json::from_value::<Reply>(value).expect("a reply");
    let replies: Vec<Reply> = lines("reply").into_iter().map(read).collect();
    assert!(
        matches!(replies[0], Reply::Hello { version: 2, pid_namespace: 4_026_532_003, .. }),
        "{replies:?}"
    );
    assert_eq!(replies[1], Reply::Started { session: 7, pid: 12 });
    assert_eq!(replies[2], Reply::Done);
    assert_eq!(replies[3], Reply::Refused { message: "that session has ended".into() });
    let read = |value: Value| serde_json::from_value::<Notice>(value).expect("a notice");
    let notices: Vec<Notice> = lines("notice").into_iter().map(read).collect();
    assert!(
        matches!(&notices[0], Notice::Started { session: 7, pid: 12, command, .. } if command.len() == 2)
    );
    assert_eq!(notices[1], Notice::Ended { session: 7, status: ExitStatus::Exit(0) });
    assert_eq!(notices[2], Notice::Ended { session: 8, status: ExitStatus::Signal(9) });
}

/// A newer init may tell more than we know.
#[test]
fn what_is_unknown_in_an_answer_is_passed_over() {
    for mut value in lines("reply") {
        value["news"] = Value::Bool(true);
        serde_json::from_value::<Reply>(value).expect("a reply");
    }
    for mut value in lines("notice") {
        value["news"] = Value::Bool(true);
        serde_json::from_value::<Notice>(value).expect("a notice");
    }
    let mut request = serde_json::to_value(Request::Stop { timeout_ms: 0 }).expect("JSON");
    request["news"] = Value::Bool(true);
    assert!(
        serde_json::from_value::<Request>(request).is_err(),
        "a request that is half understood is carried out"
    );
}
