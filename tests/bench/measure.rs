//! Times taken, put in order, told.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

/// Run a command to its end, streams at /dev/null, and see that it succeeds.
pub fn time(command: &mut Command) -> Duration {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    let begin = Instant::now();
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let taken = begin.elapsed();
    assert!(status.success(), "{command:?}: {status}");
    taken
}

#[derive(Default)]
pub struct Times(Vec<Duration>);

/// As many series, still empty.
pub fn series<const COUNT: usize>() -> [Times; COUNT] {
    std::array::from_fn(|_| Times::default())
}

impl Times {
    pub fn add(&mut self, taken: Duration) {
        self.0.push(taken);
    }

    /// Milliseconds below which so many hundredths of all runs are.
    fn percentile(&self, hundredths: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted[(sorted.len() - 1) * hundredths / 100].as_secs_f64() * 1e3
    }

    pub fn median(&self) -> f64 {
        self.percentile(50)
    }
}

#[derive(Default)]
pub struct Report(Vec<String>);

impl Report {
    fn tell(&mut self, value: &serde_json::Value, line: String) {
        println!("{value}");
        eprintln!("{line}");
        self.0.push(line);
    }

    /// Two series beside each other; `goal` is the highest ratio, `None` where it is told for comparison only.
    pub fn ratio(&mut self, name: &str, ours: &Times, against: &str, theirs: &Times, goal: Option<f64>) {
        let ratio = ours.median() / theirs.median();
        let quartiles = |times: &Times| [25, 50, 75].map(|part| (times.percentile(part) * 1e3).round() / 1e3);
        let value = json!({
            "name": name, "against": against, "rounds": ours.0.len(),
            "ours_ms": quartiles(ours), "theirs_ms": quartiles(theirs),
            "ratio": (ratio * 1e3).round() / 1e3, "goal": goal, "met": goal.map(|goal| ratio <= goal),
        });
        let verdict = goal.map_or(String::new(), |goal| format!("goal {goal:.2}  {}", met(ratio <= goal)));
        let line = format!(
            "{name:<34} {:>8.1} ms  {against:<34} {:>8.1} ms  ratio {ratio:>5.2}  {verdict}",
            ours.median(),
            theirs.median()
        );
        self.tell(&value, line);
    }

    /// One figure and its upper bound.
    pub fn bound(&mut self, name: &str, value: f64, unit: &str, limit: f64) {
        let json =
            json!({ "name": name, "value": value, "unit": unit, "limit": limit, "met": value <= limit });
        let line = format!("{name:<34} {value:>8.1} {unit}  at most {limit:.1}  {}", met(value <= limit));
        self.tell(&json, line);
    }

    pub fn table(&self) {
        eprintln!("\n{}", self.0.join("\n"));
    }
}

fn met(yes: bool) -> &'static str {
    if yes { "met" } else { "MISSED" }
}
