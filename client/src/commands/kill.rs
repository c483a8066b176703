//! `casemate kill`.

use clap::Args;
use rustix::process::Signal;

use crate::bus::{Failure, connect, environment};
use crate::jobs::follow;

#[derive(Args)]
pub struct Kill {
    environment: String,
    /// Signal for each session's process, by name or number; KILL ends the whole environment
    #[arg(long, short, default_value = "KILL", value_parser = signal)]
    signal: i32,
}

/// `TERM`, `SIGTERM`, `term` or `15`.
fn signal(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse::<i32>() {
        let known = (1..=64).contains(&number);
        return known.then_some(number).ok_or_else(|| format!("there is no signal {number}"));
    }
    let upper = text.to_ascii_uppercase();
    let found = match upper.strip_prefix("SIG").unwrap_or(&upper) {
        "HUP" => Signal::HUP,
        "INT" => Signal::INT,
        "QUIT" => Signal::QUIT,
        "ABRT" => Signal::ABORT,
        "KILL" => Signal::KILL,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        "ALRM" => Signal::ALARM,
        "TERM" => Signal::TERM,
        "CONT" => Signal::CONT,
        "STOP" => Signal::STOP,
        "TSTP" => Signal::TSTP,
        "WINCH" => Signal::WINCH,
        _ => return Err(
            "give HUP, INT, QUIT, ABRT, KILL, USR1, USR2, ALRM, TERM, CONT, STOP, TSTP, WINCH or a number"
                .into(),
        ),
    };
    Ok(found.as_raw())
}

pub async fn run(kill: Kill) -> Result<u8, Failure> {
    let connection = connect().await?;
    let job =
        environment(&connection, &kill.environment).await?.kill(kill.signal, Default::default()).await?;
    follow(&connection, &job).await?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::signal;

    #[test]
    fn signals_by_name_and_number() {
        for text in ["TERM", "sigterm", "15"] {
            assert_eq!(signal(text), Ok(15), "{text}");
        }
        for text in ["0", "65", "-9", "SIGNONSENSE", ""] {
            assert!(signal(text).is_err(), "{text}");
        }
    }
}
