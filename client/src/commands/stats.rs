//! `casemate stats`: what environments use, counted by the kernel, once or again and again.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use zbus::{Connection, OwnedVariant};

use crate::bus::{Failure, connect, environment, properties};
use crate::commands::list::environments;
use crate::commands::show::{INTERFACE, Limit, Shown};
use crate::output::{json, size, table};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// What is shown first has a percentage too.
const FIRST: Duration = Duration::from_millis(250);

#[derive(Args)]
pub struct Stats {
    /// Names or ids [default: all that run]
    environments: Vec<String>,
    /// Look once
    #[arg(long)]
    no_stream: bool,
    /// Print the result as JSON, one array for each look
    #[arg(long)]
    json: bool,
}

/// `null` is what the kernel does not count here.
#[derive(Serialize)]
struct Row {
    name: String,
    id: String,
    state: String,
    /// Of one processor, since the last look.
    cpu_percent: Option<f64>,
    cpu_microseconds: Option<u64>,
    memory_bytes: Option<u64>,
    memory_peak_bytes: Option<u64>,
    memory_limit_bytes: Option<u64>,
    swap_bytes: Option<u64>,
    pids: Option<u64>,
    io_read_bytes: Option<u64>,
    io_write_bytes: Option<u64>,
    oom_kills: u64,
}

type Before = HashMap<String, (Instant, u64)>;

fn row(found: &HashMap<String, OwnedVariant>, before: &mut Before) -> Row {
    let shown = Shown::from_properties(found);
    let number = |name: &str| {
        let value = found.get(name)?.try_clone().ok()?;
        u64::try_from(value).ok().filter(|value| *value != u64::MAX)
    };
    let cpu = number("CpuUsage");
    let (now, id) = (Instant::now(), shown.id);
    let cpu_percent = cpu.and_then(|cpu| {
        let (then, used) = before.insert(id.clone(), (now, cpu))?;
        let microseconds = now.duration_since(then).as_secs_f64() * 1e6;
        #[allow(clippy::cast_precision_loss)]
        let used = cpu.saturating_sub(used) as f64;
        (microseconds > 0.0).then(|| (used / microseconds * 10_000.0).round() / 100.0)
    });
    let memory_limit_bytes = match shown.limits.get("memory_limit_mb") {
        Some(Limit::Number(mib)) if !shown.unenforced_limits.contains(&"memory_limit_mb".to_owned()) => {
            Some(mib << 20)
        }
        _ => None,
    };
    Row {
        name: shown.name,
        id,
        state: shown.state,
        cpu_percent,
        cpu_microseconds: cpu,
        memory_bytes: number("MemoryCurrent"),
        memory_peak_bytes: number("MemoryPeak"),
        memory_limit_bytes,
        swap_bytes: number("SwapCurrent"),
        pids: number("PidsCurrent"),
        io_read_bytes: number("IoReadBytes"),
        io_write_bytes: number("IoWriteBytes"),
        oom_kills: shown.oom_kills,
    }
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let bytes = |value: Option<u64>| or_none(value.map(size));
        vec![
            self.name.clone(),
            or_none(self.cpu_percent.map(|percent| format!("{percent:.1}%"))),
            bytes(self.memory_bytes),
            bytes(self.memory_limit_bytes),
            bytes(self.swap_bytes),
            or_none(self.pids.map(|pids| pids.to_string())),
            bytes(self.io_read_bytes),
            bytes(self.io_write_bytes),
            self.oom_kills.to_string(),
        ]
    }
}

async fn look(
    connection: &Connection,
    selectors: &[String],
    before: &mut Before,
) -> Result<Vec<Row>, Failure> {
    if selectors.is_empty() {
        let running = environments(connection).await?;
        let mut rows: Vec<Row> = running.iter().map(|found| row(found, before)).collect();
        rows.retain(|row| ["running", "paused"].contains(&row.state.as_str()));
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        return Ok(rows);
    }
    let mut rows = Vec::new();
    for selector in selectors {
        let path = environment(connection, selector).await?.inner().path().to_string();
        rows.push(row(&properties(connection, &path, INTERFACE).await?, before));
    }
    Ok(rows)
}

pub async fn run(stats: Stats) -> Result<u8, Failure> {
    let connection = connect().await?;
    let mut before = Before::new();
    look(&connection, &stats.environments, &mut before).await?;
    let mut pause = FIRST;
    loop {
        tokio::time::sleep(pause).await;
        pause = PERIOD;
        let rows = look(&connection, &stats.environments, &mut before).await?;
        if stats.json {
            json(&rows)?;
        } else {
            if !stats.no_stream && std::io::stdout().is_terminal() {
                // Home, and clear from there.
                print!("\x1b[H\x1b[J");
            }
            table(
                &["NAME", "CPU", "MEMORY", "LIMIT", "SWAP", "PIDS", "READ", "WRITTEN", "OOM"],
                &rows.iter().map(Row::cells).collect::<Vec<_>>(),
            );
        }
        // Whoever reads may have had enough.
        if stats.no_stream || std::io::stdout().flush().is_err() {
            return Ok(0);
        }
    }
}
