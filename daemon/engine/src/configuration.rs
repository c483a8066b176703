//! Configuration files: `policy.toml` and `sources.d/`, the user's over `/etc`'s over the shipped ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use casemate_manifest::Policy;
use casemate_store::Name;
use serde::Deserialize;

use crate::error::Error;

/// Most bytes of a configuration file or key.
const FILE_MAX: u64 = 1 << 20;

/// A file in `sources.d/`.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum SourceFile {
    /// A signed Debian archive.
    DebianArchive {
        /// Base URLs in the order in which they are tried. `apt` stands for the one that the host's own apt uses.
        mirrors: Vec<String>,
        /// ASCII-armoured certificates, relative to the directory that holds `sources.d`.
        keyring: Vec<String>,
        suites: Vec<String>,
        #[serde(default = "main")]
        component: String,
        /// Packages beside those that every system needs.
        #[serde(default)]
        include: Vec<String>,
    },
}

fn main() -> String {
    "main".to_owned()
}

pub struct SourceDefinition {
    pub name: Name,
    /// The directory that `keyring` is relative to.
    pub base: PathBuf,
    pub file: SourceFile,
}

pub(crate) fn read(path: &Path) -> Result<Option<String>, Error> {
    let Some(bytes) = read_bytes(path)? else { return Ok(None) };
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::Configuration { path: path.to_owned(), message: "it is not UTF-8".to_owned() })?;
    Ok(Some(text))
}

pub(crate) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, FILE_MAX + 1), &mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(Error::Configuration {
            path: path.to_owned(),
            message: format!("longer than {FILE_MAX} bytes; this is no configuration file"),
        });
    }
    Ok(Some(bytes))
}

/// The policy in force: the first `policy.toml` found, else the built-in one.
pub fn policy(directories: &[PathBuf]) -> Result<Policy, Error> {
    for directory in directories {
        let path = directory.join("policy.toml");
        if let Some(text) = read(&path)? {
            return Policy::parse(&text)
                .map_err(|error| Error::Configuration { path, message: error.to_string() });
        }
    }
    Ok(Policy::default())
}

/// All sources, by name; a file of the user's hides one of the same name further down.
pub fn sources(directories: &[PathBuf]) -> Result<BTreeMap<Name, SourceDefinition>, Error> {
    let mut found = BTreeMap::new();
    for base in directories {
        let directory = base.join("sources.d");
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("list", directory)(error)),
        };
        for entry in entries {
            let path = entry.map_err(Error::io("list", &directory))?.path();
            if path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let name: Name = stem.parse()?;
            if found.contains_key(&name) {
                continue;
            }
            let Some(text) = read(&path)? else { continue };
            let file = toml::from_str(&text)
                .map_err(|error| Error::Configuration { path: path.clone(), message: error.to_string() })?;
            found.insert(name.clone(), SourceDefinition { name, base: base.clone(), file });
        }
    }
    Ok(found)
}

/// The certificates of a source.
pub fn keyring(definition: &SourceDefinition, files: &[String]) -> Result<Vec<String>, Error> {
    files
        .iter()
        .map(|file| {
            let path = definition.base.join(file);
            read(&path)?.ok_or_else(|| Error::Configuration {
                path: path.clone(),
                message: format!("not found; source {:?} names it as a key", definition.name.as_str()),
            })
        })
        .collect()
}

/// Base URLs that the host's own apt has for `suite` and `component`, in its order.
pub fn apt_mirrors(root: &Path, suite: &str, component: &str) -> Vec<String> {
    let mut files = vec![root.join("etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir(root.join("etc/apt/sources.list.d")) {
        let mut more: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        more.sort();
        files.extend(more);
    }
    let mut mirrors = Vec::new();
    for path in files {
        // What apt itself cannot read is not its mirror.
        let Ok(Some(text)) = read(&path) else { continue };
        let found = match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => one_line(&text, suite, component),
            Some("sources") => deb822(&text, suite, component),
            _ => continue,
        };
        for url in found {
            let url = url.trim_end_matches('/').to_owned();
            let usable = url.starts_with("https://") || url.starts_with("http://");
            if usable && !mirrors.contains(&url) {
                mirrors.push(url);
            }
        }
    }
    mirrors
}

/// `deb [options] URL SUITE COMPONENT…`
fn one_line(text: &str, suite: &str, component: &str) -> Vec<String> {
    let entry = |line: &str| {
        let line = line.split('#').next()?.trim();
        let mut rest = line.strip_prefix("deb")?.trim_start();
        if !line[3..].starts_with(char::is_whitespace) {
            return None;
        }
        if let Some(options) = rest.strip_prefix('[') {
            rest = options.split_once(']')?.1;
        }
        let mut words = rest.split_whitespace();
        let url = words.next()?;
        (words.next()? == suite && words.any(|word| word == component)).then(|| url.to_owned())
    };
    text.lines().filter_map(entry).collect()
}

/// Paragraphs of `Types`, `URIs`, `Suites`, `Components`.
fn deb822(text: &str, suite: &str, component: &str) -> Vec<String> {
    let mut urls = Vec::new();
    let plain: String =
        text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line, "\n"]).collect();
    for paragraph in plain.split("\n\n") {
        let field = |name: &str| -> Vec<&str> {
            let mut lines = paragraph.lines().skip_while(|line| {
                line.split_once(':').is_none_or(|(field, _)| !field.trim().eq_ignore_ascii_case(name))
            });
            let Some((_, first)) = lines.next().and_then(|line| line.split_once(':')) else {
                return Vec::new();
            };
            let more = lines.take_while(|line| line.starts_with([' ', '\t']));
            first.split_whitespace().chain(more.flat_map(str::split_whitespace)).collect()
        };
        let enabled = !field("Enabled").first().is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if enabled
            && field("Types").contains(&"deb")
            && field("Suites").contains(&suite)
            && field("Components").contains(&component)
        {
            urls.extend(field("URIs").iter().map(|url| (*url).to_owned()));
        }
    }
    urls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_style() {
        let text = "# deb https://a.example/debian bookworm main\ndeb [arch=amd64 signed-by=/k] https://b.example/debian bookworm contrib main # x\n\
                    deb-src https://c.example/debian bookworm main\ndeb https://d.example/debian-security bookworm-security main\n";
        assert_eq!(one_line(text, "bookworm", "main"), ["https://b.example/debian"]);
    }

    #[test]
    fn deb822_style() {
        let text = "Types: deb deb-src\n# comment\nURIs: https://a.example/debian\n  https://b.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\n\nTypes: deb\nEnabled: no\nURIs: https://c.example/debian\nSuites: bookworm\nComponents: main\n";
        assert_eq!(
            deb822(text, "bookworm", "main"),
            ["https://a.example/debian", "https://b.example/debian"]
        );
        assert!(deb822(text, "trixie", "main").is_empty());
    }
}
