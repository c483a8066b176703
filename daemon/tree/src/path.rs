//! Paths of trees in the store, as a request names them: judged once, here.

use crate::error::{Error, Result};

/// A relative path below `staging/`, `layers/` or `uppers/`, of plain components; or one below `objects/`, to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorePath(String);

impl StorePath {
    /// A tree's.
    pub fn parse(text: &str) -> Result<Self> {
        Self::below(text, &["staging", "layers", "uppers"])
    }

    /// What may be removed: trees, objects, and the directories that hold objects.
    pub fn removable(text: &str) -> Result<Self> {
        Self::below(text, &["staging", "layers", "uppers", "objects"])
    }

    fn below(text: &str, roots: &[&str]) -> Result<Self> {
        let plain = |component: &str| {
            let bytes = component.as_bytes();
            (1..=200).contains(&bytes.len())
                && bytes[0].is_ascii_alphanumeric()
                && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-@".contains(b))
        };
        let mut components = text.split('/');
        let first = components.next();
        let rest = components.clone().count();
        let good = first.is_some_and(|first| roots.contains(&first))
            && (1..=8).contains(&rest)
            && components.all(plain);
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::Request { path: text.chars().take(300).collect() })
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn in_staging(&self) -> bool {
        self.0.starts_with("staging/")
    }

    /// Directory and last component.
    pub fn split(&self) -> (&str, &str) {
        self.0.rsplit_once('/').expect("a parsed path has two components or more")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_below_the_trees() {
        for text in ["staging/a", "staging/a/tree", "layers/00ff", "uppers/id/upper"] {
            assert!(StorePath::parse(text).is_ok(), "{text}");
        }
        let bad = [
            "",
            "/",
            "staging",
            "staging/",
            "layers/",
            "/staging/a",
            "staging/../layers",
            "staging/a/..",
            "./staging/a",
            "objects/aa",
            "releases/x",
            "environments/x",
            "version",
            "staging//a",
            "staging/a/",
            "staging/.a",
            "staging/a\0",
            "staging/a b",
            "staging/-a",
            "staging/1/2/3/4/5/6/7/8/9",
        ];
        for text in bad {
            assert!(StorePath::parse(text).is_err(), "{text:?}");
        }
        assert!(StorePath::removable("objects/aa").is_ok());
        assert!(StorePath::removable("objects").is_err());
        assert!(StorePath::removable("releases/x").is_err());
    }
}
