//! The variables of a session: the environment's own, the calling client's few, the manifest's. Nothing else.

use std::collections::BTreeMap;

use crate::manifest::variable_name;
use crate::policy::{Policy, Refusal};

/// Who a session is inside.
#[derive(Debug, Clone, Copy)]
pub struct SessionAccount<'a> {
    pub name: &'a str,
    pub uid: u32,
    pub home: &'a str,
    pub shell: &'a str,
}

/// What is taken of the client's own environment unasked; the rest comes only when its user names it.
const OF_CLIENT: &[&str] = &["TERM", "LANG", "COLORTERM", "TZ"];

/// `NAME=value`, complete. `client` is what the client sent; later ones override earlier ones: client, manifest, own.
pub fn session_variables(
    policy: &Policy,
    account: &SessionAccount<'_>,
    client: &[(String, String)],
    manifest: &BTreeMap<String, String>,
    root: bool,
) -> Result<Vec<String>, Refusal> {
    let mut variables = BTreeMap::new();
    let path = if root {
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    } else {
        "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
    };
    variables.insert("PATH", path);
    variables.insert("LANG", "C.UTF-8");
    variables.insert("TERM", "dumb");
    let asked: BTreeMap<String, String> = client.iter().cloned().collect();
    let given = |name: &str| OF_CLIENT.contains(&name) || name.starts_with("LC_");
    let extra: BTreeMap<String, String> =
        asked.iter().filter(|(name, _)| !given(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
    policy.judge_variables(&extra)?;
    for (name, value) in asked.iter().chain(manifest) {
        if !variable_name(name) || value.contains('\0') {
            return Err(Refusal::VariableDenied {
                name: name.escape_debug().to_string(),
                reason: "name or value is malformed",
            });
        }
        variables.insert(name, value);
    }
    let runtime = format!("/run/user/{}", account.uid);
    variables.insert("HOME", account.home);
    variables.insert("USER", account.name);
    variables.insert("LOGNAME", account.name);
    variables.insert("SHELL", account.shell);
    if !root {
        variables.insert("XDG_RUNTIME_DIR", &runtime);
    }
    Ok(variables.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_decides_who_one_is() {
        let account = SessionAccount { name: "ann", uid: 1000, home: "/home/ann", shell: "/bin/bash" };
        let client = [("TERM".to_owned(), "xterm".to_owned()), ("LC_ALL".to_owned(), "C".to_owned())];
        let manifest = BTreeMap::from([("EDITOR".to_owned(), "vi".to_owned())]);
        let variables =
            session_variables(&Policy::default(), &account, &client, &manifest, false).expect("good");
        for expected in [
            "HOME=/home/ann",
            "TERM=xterm",
            "EDITOR=vi",
            "LC_ALL=C",
            "XDG_RUNTIME_DIR=/run/user/1000",
            "LANG=C.UTF-8",
        ] {
            assert!(variables.iter().any(|variable| variable == expected), "{expected} in {variables:?}");
        }
        for (name, value) in [("SSH_AUTH_SOCK", "/x"), ("HOME", "/x"), ("A B", "x"), ("A", "\0")] {
            let client = [(name.to_owned(), value.to_owned())];
            assert!(
                session_variables(&Policy::default(), &account, &client, &manifest, false).is_err(),
                "{name}"
            );
        }
    }
}
