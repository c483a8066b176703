//! `casemate logs`.

use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use clap::Args;

use crate::bus::{Failure, connect, environment};
use crate::output;

/// Between two looks at a log that is followed.
const PAUSE: Duration = Duration::from_millis(200);

#[derive(Args)]
pub struct Logs {
    environment: String,
    /// Go on until the environment stops
    #[arg(long, short)]
    follow: bool,
    /// This many of the last lines
    #[arg(long, short = 'n')]
    lines: Option<usize>,
}

fn failed(error: std::io::Error) -> Failure {
    Failure::Local(format!("cannot read the log: {error}"))
}

/// Where the last `lines` lines begin.
fn begin(file: &mut File, lines: usize) -> std::io::Result<u64> {
    let mut begins = std::collections::VecDeque::from([0]);
    let (mut at, mut line) = (0, Vec::new());
    let mut reader = BufReader::new(file);
    loop {
        line.clear();
        let count = reader.read_until(b'\n', &mut line)?;
        if count == 0 {
            break;
        }
        at += count as u64;
        begins.push_back(at);
        if begins.len() > lines + 1 {
            begins.pop_front();
        }
    }
    // With too few lines it is the beginning of the file.
    Ok(begins.front().copied().unwrap_or_default())
}

/// Print what has come since. On a terminal nothing of a stranger's moves the cursor.
fn print(file: &mut File, position: &mut u64) -> std::io::Result<()> {
    // Init keeps the file short: then what was printed last is nearer to its beginning.
    *position = (*position).min(file.metadata()?.len());
    file.seek(SeekFrom::Start(*position))?;
    let mut new = Vec::new();
    *position += file.read_to_end(&mut new)? as u64;
    if std::io::stdout().is_terminal() {
        output::print(&output::printable(&String::from_utf8_lossy(&new)));
    } else if let Err(error) =
        std::io::stdout().lock().write_all(&new).and_then(|()| std::io::stdout().flush())
    {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => {
                std::process::exit(128 + rustix::process::Signal::PIPE.as_raw())
            }
            _ => return Err(error),
        }
    }
    Ok(())
}

pub async fn run(logs: Logs) -> Result<u8, Failure> {
    let connection = connect().await?;
    let environment = environment(&connection, &logs.environment).await?;
    let mut file = File::from(OwnedFd::from(environment.open_log(Default::default()).await?));
    let mut position = match logs.lines {
        Some(lines) => begin(&mut file, lines).map_err(failed)?,
        None => 0,
    };
    loop {
        // Before the look: what it printed at its end is there when it has stopped.
        let stopped = logs.follow && !["running", "paused"].contains(&environment.state().await?.as_str());
        print(&mut file, &mut position).map_err(failed)?;
        if !logs.follow || stopped {
            return Ok(0);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"a\nbc\nd").expect("written");
        for (lines, expected) in [(0, 6), (1, 5), (2, 2), (3, 0), (9, 0)] {
            file.rewind().expect("rewound");
            assert_eq!(begin(&mut file, lines).expect("read"), expected, "{lines}");
        }
    }
}
