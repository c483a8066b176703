//! What of the user's session bus an environment may reach: names of services, which a proxy lets pass and nothing else.

use serde::{Deserialize, Serialize};

/// Casemate's own service. Who may talk to it has the user's rights, so no environment may, whatever policy says.
const OWN: &str = "org.casemate.Casemate1";
/// Most bytes of a name, by the D-Bus specification.
const NAME_MAX: usize = 255;

/// Names, or `NAME.*` for a name and all below it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SessionBus {
    /// Services that may be called, and whose signals come in.
    pub talk: Vec<String>,
    /// Names that the environment's own services may take.
    pub own: Vec<String>,
}

/// Whether what `pattern` stands for is all that `name` stands for, or more.
fn covers(pattern: &str, name: &str) -> bool {
    let Some(top) = pattern.strip_suffix(".*") else { return pattern == name };
    let name = name.strip_suffix(".*").unwrap_or(name);
    name.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn is_name(text: &str) -> bool {
    let name = text.strip_suffix(".*").unwrap_or(text);
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '-')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    text.len() <= NAME_MAX && name.split('.').count() >= 2 && name.split('.').all(part)
}

impl SessionBus {
    pub fn is_empty(&self) -> bool {
        self.talk.is_empty() && self.own.is_empty()
    }

    /// What is asked for, as `show` says it.
    pub fn words(&self) -> impl Iterator<Item = String> {
        let all = |verb: &'static str, names: &[String]| {
            names.iter().map(move |name| format!("session-bus {verb} {name}")).collect::<Vec<_>>()
        };
        all("talk", &self.talk).into_iter().chain(all("own", &self.own))
    }

    /// What is wrong with a name in it: the key, the name, the rule.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String, &'static str)> {
        for (key, names) in [("gui.session_bus.talk", &self.talk), ("gui.session_bus.own", &self.own)] {
            for name in names {
                if !is_name(name) {
                    let rule = "is no name on a bus; write \"org.example.Service\", or \"org.example.*\" for all below it";
                    return Err((key, name.clone(), rule));
                }
                if covers(name, OWN) || covers(&format!("{OWN}.*"), name) {
                    let rule = "leads to Casemate itself, which no environment may reach";
                    return Err((key, name.clone(), rule));
                }
            }
        }
        Ok(())
    }

    /// The first word that `self`, as policy has it, does not allow.
    pub(crate) fn first_denied(&self, asked: &Self) -> Option<(&'static str, String)> {
        [("talk", &self.talk, &asked.talk), ("own", &self.own, &asked.own)].into_iter().find_map(
            |(verb, allowed, asked)| {
                let denied = asked.iter().find(|name| !allowed.iter().any(|pattern| covers(pattern, name)));
                denied.map(|name| (verb, name.clone()))
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(names: &[&str]) -> SessionBus {
        SessionBus { talk: names.iter().map(|name| (*name).to_owned()).collect(), own: vec![] }
    }

    #[test]
    fn names_as_the_bus_has_them() {
        for good in ["org.example.A", "org.example.*", "a.b", "org._x.y-z"] {
            assert_eq!(talk(&[good]).check(), Ok(()), "{good}");
        }
        for bad in [
            "",
            "org",
            "*",
            "org.*",
            "org.*.x",
            ":1.5",
            "org.1x",
            "org..x",
            "org.x.",
            "org.x=y",
            "org.x --own=z",
        ] {
            assert!(talk(&[bad]).check().is_err(), "{bad}");
        }
    }

    #[test]
    fn nobody_reaches_casemate() {
        for name in [OWN, "org.casemate.*", "org.casemate.Casemate1.*", "org.casemate.Casemate1.x"] {
            for asked in [talk(&[name]), SessionBus { own: vec![name.to_owned()], talk: vec![] }] {
                assert!(asked.check().is_err(), "{name}");
            }
        }
        assert_eq!(talk(&["org.casemate.Other", "org.casemates.*"]).check(), Ok(()));
    }

    #[test]
    fn policy_covers_what_it_names() {
        let policy = talk(&["org.a.B", "org.portal.*"]);
        for asked in ["org.a.B", "org.portal", "org.portal.X", "org.portal.X.*", "org.portal.*"] {
            assert_eq!(policy.first_denied(&talk(&[asked])), None, "{asked}");
        }
        for asked in ["org.a.C", "org.a.B.*", "org.a.B.C", "org.*", "org.portals.X"] {
            assert_eq!(policy.first_denied(&talk(&[asked])), Some(("talk", asked.to_owned())), "{asked}");
        }
        let own = SessionBus { own: vec!["org.a.B".to_owned()], talk: vec![] };
        assert_eq!(policy.first_denied(&own), Some(("own", "org.a.B".to_owned())));
    }
}
