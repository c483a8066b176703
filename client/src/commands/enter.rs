//! `casemate enter`.

use clap::Args;

use crate::bus::{Failure, connect, environment};
use crate::session::{self, Request};

#[derive(Args)]
pub struct Enter {
    environment: String,
    /// As the environment's root
    #[arg(long)]
    root: bool,
    /// Directory inside [default: ours, where it is mounted, else the home]
    #[arg(long, short)]
    workdir: Option<String>,
    /// Variable, NAME=VALUE, or NAME for our own value
    #[arg(long = "env", short)]
    variables: Vec<String>,
    /// By the user's login shell, as without a command
    #[arg(long, short)]
    login: bool,
    /// Command [default: the login shell]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub async fn run(enter: Enter) -> Result<u8, Failure> {
    let connection = connect().await?;
    let environment = environment(&connection, &enter.environment).await?;
    let request = Request {
        command: enter.command,
        root: enter.root,
        directory: enter.workdir,
        login: enter.login,
        variables: enter.variables,
    };
    session::terminal(&environment, request).await
}
