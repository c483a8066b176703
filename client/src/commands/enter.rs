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
    /// Command [default: the login shell]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub async fn run(enter: Enter) -> Result<u8, Failure> {
    let connection = connect().await?;
    let environment = environment(&connection, &enter.environment).await?;
    let request = Request { command: enter.command, root: enter.root, directory: None, variables: vec![] };
    session::terminal(&environment, request).await
}
