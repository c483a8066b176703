//! `casemate diff`.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::fd::AsFd;

use clap::Args;
use serde::Serialize;
use zbus::Variant;

use crate::bus::{Failure, connect, environment};
use crate::jobs::follow;
use crate::output::{json, print, print_bytes, printable};

#[derive(Args)]
pub struct Diff {
    environment: String,
    /// Compare with this snapshot [default: what was last committed, restored or built]
    snapshot: Option<String>,
    /// Print a unified diff of what is in files
    #[arg(long, short, conflicts_with = "json")]
    patch: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// One side of a difference.
#[derive(Debug, PartialEq, Serialize)]
struct Side {
    /// `d`, `f`, `l`, `p`, `s`
    r#type: String,
    /// Octal.
    mode: String,
    /// Numbers, or `user`.
    uid: String,
    gid: String,
}

#[derive(Debug, PartialEq, Serialize)]
struct Difference {
    path: String,
    /// `added`, `deleted`, `type`, `modified`, `mode`, `attributes`
    change: String,
    old: Option<Side>,
    new: Option<Side>,
}

fn side(text: &str) -> Option<Side> {
    let mut fields = text.split(':').map(str::to_owned);
    Some(Side { r#type: fields.next()?, mode: fields.next()?, uid: fields.next()?, gid: fields.next()? })
}

fn difference(line: &str) -> Option<Difference> {
    let mut words = line.splitn(4, ' ');
    let change = words.next()?.to_owned();
    let (old, new) = (side(words.next()?), side(words.next()?));
    let path = match words.next()? {
        "." => "/".to_owned(),
        path => format!("/{path}"),
    };
    Some(Difference { path, change, old, new })
}

/// As `modified /etc/motd`, and what became of mode and owner.
fn shown(difference: &Difference) -> String {
    let about = |side: &Side| format!("{} {}:{}", side.mode, side.uid, side.gid);
    let sides = (&difference.old, &difference.new);
    let more = match sides {
        (Some(old), Some(new)) if about(old) != about(new) => format!("  ({} → {})", about(old), about(new)),
        _ => String::new(),
    };
    format!("{:10} {}{more}\n", difference.change, difference.path)
}

pub async fn run(diff: Diff) -> Result<u8, Failure> {
    let failed = |error: std::io::Error| Failure::Local(format!("cannot read the differences: {error}"));
    let connection = connect().await?;
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    let (patch, snapshot) = (Variant::from(diff.patch), diff.snapshot.map(Variant::from));
    let mut options = HashMap::from([("patch", &patch)]);
    options.extend(snapshot.as_ref().map(|name| ("snapshot", name)));
    let job = environment(&connection, &diff.environment).await?.diff(writer.as_fd().into(), options).await?;
    drop(writer);
    let as_json = diff.json;
    let is_terminal = std::io::stdout().is_terminal();
    // As it comes; the other end is a worker, which waits where nobody reads.
    let reading = tokio::task::spawn_blocking(move || -> std::io::Result<Vec<Difference>> {
        let mut lines = BufReader::new(reader);
        let mut found = Vec::new();
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            match (diff.patch, difference(text.trim_end_matches('\n'))) {
                // For a person; tabs are harmless. Whoever applies it wants it as it is.
                (true, _) if is_terminal => {
                    print(&text.split('\t').map(printable).collect::<Vec<_>>().join("\t"));
                }
                (true, _) => print_bytes(&line),
                (false, Some(one)) if as_json => found.push(one),
                (false, Some(one)) => print(&shown(&one)),
                (false, None) => {}
            }
            line.clear();
        }
        Ok(found)
    });
    follow(&connection, &job).await?;
    let found = reading.await.map_err(|error| failed(std::io::Error::other(error)))?.map_err(failed)?;
    if as_json {
        json(&found)?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told() {
        let one = difference("modified f:0644:0:0 f:0755:0:user etc/a\\x20b").expect("a difference");
        assert_eq!((one.path.as_str(), one.change.as_str()), ("/etc/a\\x20b", "modified"));
        assert_eq!(shown(&one), "modified   /etc/a\\x20b  (0644 0:0 → 0755 0:user)\n");
        let root = difference("mode d:0755:0:0 d:0700:0:0 .").expect("a difference");
        assert_eq!(root.path, "/");
        let added = difference("added - d:0755:user:user home/ann").expect("a difference");
        assert_eq!(
            (added.old, shown(&difference("added - d:0755:user:user home/ann").expect("one"))),
            (None, "added      /home/ann\n".into())
        );
        assert_eq!(difference("odd"), None);
    }
}
