//! Login shells. All of it runs in the session's own process, after its rights are gone: what it reads, /etc/passwd, is the
//! environment's.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// Most bytes of /etc/passwd that are looked at.
const PASSWD_MAX: u64 = 1 << 20;
/// Shells that are known to take `-c 'exec "$@"' NAME ARGUMENT…`.
const POSIX: &[&str] = &["sh", "ash", "bash", "busybox", "dash", "ksh", "mksh", "zsh"];

/// A file to execute, looked up in `PATH` where it has no slash, and its whole argument vector.
pub struct Program {
    pub file: String,
    pub arguments: Vec<String>,
}

impl Program {
    pub fn plain(command: &[String]) -> Self {
        Self { file: command.first().cloned().unwrap_or_default(), arguments: command.to_owned() }
    }
}

fn name(shell: &str) -> &str {
    shell.rsplit('/').next().unwrap_or(shell)
}

/// `argv[0]` of a login shell, as login(1) has it.
pub fn shown(shell: &str) -> String {
    format!("-{}", name(shell))
}

/// The shell of a user: the seventh field of passwd(5); an absolute path.
fn find(passwd: &str, uid: u32) -> Option<&str> {
    let uid = uid.to_string();
    let shell = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.nth(2)? == uid).then(|| fields.nth(3)).flatten()
    })?;
    (shell.starts_with('/') && !shell.contains('\0')).then_some(shell)
}

fn passwd() -> std::io::Result<String> {
    // Not to hang where it is a pipe.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/etc/passwd")?;
    let mut text = String::new();
    file.take(PASSWD_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// What a session by a login shell executes. `default` is the shell where passwd has none; SHELL will name the one taken.
pub fn program(uid: u32, default: &str, command: &[String], variables: &mut [String]) -> Program {
    // An environment that has spoiled its passwd can still be entered, to be mended.
    let passwd = passwd().unwrap_or_default();
    let shell = find(&passwd, uid).unwrap_or(default);
    for variable in variables.iter_mut().filter(|variable| variable.starts_with("SHELL=")) {
        *variable = format!("SHELL={shell}");
    }
    if command.is_empty() {
        return Program { file: shell.to_owned(), arguments: vec![shown(shell)] };
    }
    let file = if POSIX.contains(&name(shell)) { shell } else { "/bin/sh" };
    let mut arguments = vec![shown(file), "-c".to_owned(), "exec \"$@\"".to_owned(), name(file).to_owned()];
    arguments.extend(command.iter().cloned());
    Program { file: file.to_owned(), arguments }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbad\nann:x:1000:1000:,,,:/home/ann:/usr/bin/fish\n\
                          no:x:7:7::/:\nrelative:x:8:8::/:bash\n";

    #[test]
    fn shells_of_passwd() {
        assert_eq!(find(PASSWD, 0), Some("/bin/bash"));
        assert_eq!(find(PASSWD, 1000), Some("/usr/bin/fish"));
        for without in [7, 8, 9, 100] {
            assert_eq!(find(PASSWD, without), None, "{without}");
        }
    }

    #[test]
    fn a_login_shell_is_told_by_its_name() {
        assert_eq!(shown("/usr/bin/zsh"), "-zsh");
    }
}
