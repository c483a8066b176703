//! `casemate`: the thin client. Every command is one file in `commands/`; what they share is here, in `bus`, `jobs`,
//! `session` and `output`.

mod bus;
mod commands;
mod jobs;
mod output;
mod session;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::commands::alterations::To;

/// Exit code where Casemate itself failed, as podman and docker have it.
const FAILED: u8 = 125;

/// Secure compartments from verified base images, without root.
#[derive(Parser)]
#[command(name = "casemate", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Json {
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Base images
    #[command(subcommand)]
    Release(Release),
    /// Build an environment from a manifest
    Build(commands::build::Build),
    /// List environments
    List(Json),
    /// Show an environment
    Show {
        /// Name or id
        environment: String,
        #[command(flatten)]
        json: Json,
    },
    /// Run a command in an environment
    Exec(commands::exec::Exec),
    /// Open a shell, or a command, in a terminal of an environment
    Enter(commands::enter::Enter),
    /// Start an environment and keep it running
    Start {
        environment: String,
        /// Run it although this machine cannot enforce its limits
        #[arg(long)]
        unenforced_limits: bool,
    },
    /// Stop an environment
    Stop {
        environment: String,
        /// Seconds until what still runs is killed [default: the manifest's stop_timeout, or 10]
        #[arg(long)]
        timeout: Option<u64>,
    },
    /// Stop an environment and start it again
    Restart {
        environment: String,
        /// Seconds until what still runs is killed [default: the manifest's stop_timeout, or 10]
        #[arg(long)]
        timeout: Option<u64>,
        /// Run it although this machine cannot enforce its limits
        #[arg(long)]
        unenforced_limits: bool,
    },
    /// Kill an environment, or send its sessions a signal
    Kill(commands::kill::Kill),
    /// Freeze all processes of an environment
    Pause { environment: String },
    /// Let the processes of a paused environment go on
    Unpause { environment: String },
    /// Print what the command of an environment has printed
    Logs(commands::logs::Logs),
    /// Wait until an environment stops; print the exit code of the session that ended last
    Wait { environment: String },
    /// Show or change the limits of an environment
    Limits(commands::limits::Limits),
    /// Show what environments use
    Stats(commands::stats::Stats),
    /// Keep what is in an environment now as a snapshot
    Commit(commands::snapshots::Commit),
    /// List the snapshots of an environment, or remove one
    Snapshots(commands::snapshots::Snapshots),
    /// Make an environment what a snapshot says
    Restore(commands::snapshots::Restore),
    /// Make an environment what was committed last
    Rollback(commands::snapshots::Rollback),
    /// Tell what was changed in an environment
    Diff(commands::diff::Diff),
    /// Make a new environment of one that there is
    Clone(commands::alterations::Clone),
    /// Give an environment another name
    Rename {
        environment: String,
        #[arg(value_name = "NEW")]
        name: String,
    },
    /// Allow no changes of an environment
    Freeze { environment: String },
    /// Allow changes of a frozen environment again
    Thaw { environment: String },
    /// Put a frozen environment away
    Archive { environment: String },
    /// Make an archived environment a frozen one again
    Unarchive { environment: String },
    /// Remove an environment with all its files and snapshots
    Destroy {
        environment: String,
        /// Kill it first if it runs
        #[arg(long)]
        force: bool,
    },
    /// Show what environments, releases and snapshots take on the disk
    Usage(commands::store::Usage),
    /// Verify every record and file of the store
    Verify(Json),
    /// Remove what nothing refers to
    Gc(commands::store::Collect),
    /// List jobs, follow or cancel one
    Jobs(commands::jobs::Jobs),
    /// Say what this machine lacks
    Doctor(Json),
    /// Remove all environments, releases and downloads
    Purge {
        /// Do it
        #[arg(long)]
        yes: bool,
    },
    /// Print shell completions
    #[command(hide = true)]
    Completions { shell: clap_complete::Shell },
    /// Write man pages into a directory
    #[command(hide = true)]
    Man { directory: std::path::PathBuf },
}

#[derive(Subcommand)]
enum Release {
    /// List releases
    List(Json),
    /// Fetch and verify a release, such as debian/bookworm
    Fetch {
        reference: String,
        #[command(flatten)]
        json: Json,
    },
    /// Import a root filesystem archive (tar; gz, xz, zst, bz2)
    Import {
        name: String,
        archive: std::path::PathBuf,
        #[command(flatten)]
        json: Json,
    },
    /// Show a release
    Show {
        reference: String,
        #[command(flatten)]
        json: Json,
    },
    /// Remove a release
    Remove { reference: String },
}

async fn run(cli: Cli) -> Result<u8, bus::Failure> {
    match cli.command {
        Command::Release(Release::List(json)) => commands::release::list(json.json).await,
        Command::Release(Release::Fetch { reference, json }) => {
            commands::release::fetch(&reference, json.json).await
        }
        Command::Release(Release::Import { name, archive, json }) => {
            commands::release::import(&name, &archive, json.json).await
        }
        Command::Release(Release::Show { reference, json }) => {
            commands::release::show(&reference, json.json).await
        }
        Command::Release(Release::Remove { reference }) => commands::release::remove(&reference).await,
        Command::Build(build) => commands::build::run(build).await,
        Command::List(json) => commands::list::run(json.json).await,
        Command::Show { environment, json } => commands::show::run(&environment, json.json).await,
        Command::Exec(exec) => commands::exec::run(exec).await,
        Command::Enter(enter) => commands::enter::run(enter).await,
        Command::Start { environment, unenforced_limits } => {
            commands::lifecycle::start(&environment, unenforced_limits).await
        }
        Command::Stop { environment, timeout } => commands::lifecycle::stop(&environment, timeout).await,
        Command::Restart { environment, timeout, unenforced_limits } => {
            commands::lifecycle::restart(&environment, timeout, unenforced_limits).await
        }
        Command::Kill(kill) => commands::kill::run(kill).await,
        Command::Pause { environment } => commands::lifecycle::pause(&environment, true).await,
        Command::Unpause { environment } => commands::lifecycle::pause(&environment, false).await,
        Command::Logs(logs) => commands::logs::run(logs).await,
        Command::Wait { environment } => commands::wait::run(&environment).await,
        Command::Limits(limits) => commands::limits::run(limits).await,
        Command::Stats(stats) => commands::stats::run(stats).await,
        Command::Commit(commit) => commands::snapshots::commit(commit).await,
        Command::Snapshots(snapshots) => commands::snapshots::list(snapshots).await,
        Command::Restore(restore) => commands::snapshots::restore(restore).await,
        Command::Rollback(rollback) => commands::snapshots::rollback(rollback).await,
        Command::Diff(diff) => commands::diff::run(diff).await,
        Command::Clone(clone) => commands::alterations::clone(clone).await,
        Command::Rename { environment, name } => commands::alterations::rename(&environment, &name).await,
        Command::Freeze { environment } => commands::alterations::enter_state(&environment, To::Frozen).await,
        Command::Thaw { environment } => commands::alterations::enter_state(&environment, To::Thawed).await,
        Command::Archive { environment } => {
            commands::alterations::enter_state(&environment, To::Archived).await
        }
        Command::Unarchive { environment } => {
            commands::alterations::enter_state(&environment, To::Unarchived).await
        }
        Command::Destroy { environment, force } => commands::lifecycle::destroy(&environment, force).await,
        Command::Usage(usage) => commands::store::usage(usage).await,
        Command::Verify(json) => commands::store::verify(json.json).await,
        Command::Gc(collect) => commands::store::collect(collect).await,
        Command::Jobs(jobs) => commands::jobs::run(jobs).await,
        Command::Doctor(json) => commands::doctor::run(json.json).await,
        Command::Purge { yes } => commands::lifecycle::purge(yes).await,
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "casemate", &mut std::io::stdout());
            Ok(0)
        }
        Command::Man { directory } => {
            let command = <Cli as clap::CommandFactory>::command();
            clap_mangen::generate_to(command, &directory).map(|()| 0).map_err(|error| {
                bus::Failure::Local(format!("cannot write man pages to {}: {error}", directory.display()))
            })
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        // Help and version are no failures; wrong usage is ours, not a command's.
        let code = if error.use_stderr() { FAILED } else { 0 };
        let _ = error.print();
        std::process::exit(code.into())
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(cli));
            // A read of standard input may be under way, which nothing can end.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(bus::Failure::Local(error.to_string())),
    };
    match outcome {
        Ok(code) => code.into(),
        Err(failure) => {
            eprintln!("casemate: {}", output::printable(&failure.to_string()));
            FAILED.into()
        }
    }
}
