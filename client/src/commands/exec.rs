//! `casemate exec`.

use clap::Args;

use crate::bus::{Failure, connect, environment, manager};
use crate::session::{self, Request};

#[derive(Args)]
pub struct Exec {
    environment: String,
    /// Run as the environment's root
    #[arg(long)]
    root: bool,
    /// Directory inside [default: ours, where it is mounted, else the home]
    #[arg(long, short)]
    workdir: Option<String>,
    /// Variable, NAME=VALUE, or NAME for our own value
    #[arg(long = "env", short)]
    variables: Vec<String>,
    /// Open a terminal of the environment
    #[arg(long, short)]
    terminal: bool,
    /// By the user's login shell
    #[arg(long, short)]
    login: bool,
    #[arg(required_unless_present = "login", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub async fn run(exec: Exec) -> Result<u8, Failure> {
    let connection = connect().await?;
    let request = Request {
        command: exec.command,
        root: exec.root,
        directory: exec.workdir,
        login: exec.login,
        variables: exec.variables,
    };
    match exec.terminal {
        true => session::terminal(&environment(&connection, &exec.environment).await?, request).await,
        false => session::exec(&manager(&connection).await?, &exec.environment, request).await,
    }
}
