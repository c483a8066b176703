//! A `Packages` index: parsed, and the base system chosen from it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;

use casemate_worker::protocol::{Compression, Failure, FailureKind, Package};

use crate::version::{compare, satisfies};

/// Most bytes of a decompressed index; trixie's main has 55 MB.
const TEXT_MAX: u64 = 512 << 20;
/// Memory of the decoder: what `xz -9` needs.
const DECODER: u64 = 128 << 20;

fn refused(message: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Refused, "Packages", message)
}

pub fn decompress(bytes: &[u8], compression: Compression) -> Result<String, Failure> {
    let mut text = String::new();
    let reader: Box<dyn Read + '_> = match compression {
        Compression::None => Box::new(bytes),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(bytes)),
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(DECODER, 0)
                .map_err(|error| refused(error.to_string()))?;
            Box::new(liblzma::read::XzDecoder::new_stream(bytes, stream))
        }
        other => {
            return Err(Failure::new(
                FailureKind::Request,
                "Packages",
                format!("{other:?} is not read here"),
            ));
        }
    };
    reader
        .take(TEXT_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| refused(format!("it cannot be decompressed: {error}")))?;
    if text.len() as u64 > TEXT_MAX {
        return Err(Failure::new(
            FailureKind::Limit,
            "Packages",
            format!("longer than {TEXT_MAX} bytes once decompressed"),
        ));
    }
    Ok(text)
}

/// One alternative of a dependency: name, and relation with version where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Alternative {
    name: String,
    version: Option<(String, String)>,
}

type Dependency = Vec<Alternative>;

#[derive(Debug, Clone)]
pub struct Entry {
    package: Package,
    required: bool,
    /// Pre-Depends come first.
    depends: Vec<Dependency>,
    provides: Vec<Alternative>,
}

fn relations(text: &str) -> Vec<Dependency> {
    let alternative = |text: &str| {
        let text = text.trim();
        let (name, rest) = text.split_once([' ', '(']).unwrap_or((text, ""));
        let name = name.split(':').next().unwrap_or_default().to_owned();
        let bound =
            text.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(bound, _)| bound.trim());
        let version = bound.map(|bound| {
            let end = bound.find(|c: char| !"<>=".contains(c)).unwrap_or(bound.len());
            (bound[..end].to_owned(), bound[end..].trim().to_owned())
        });
        let _ = rest;
        Alternative { name, version }
    };
    text.split(',')
        .filter(|one| !one.trim().is_empty())
        .map(|one| one.split('|').map(alternative).collect())
        .collect()
}

fn valid(package: &Package) -> bool {
    let plain = |text: &str, more: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    plain(&package.name, "+-.")
        && package.name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && plain(&package.version, ".+-:~")
        && plain(&package.filename, "/.+-_~:%")
        && package.filename.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && package.sha256.len() == 64
        && package.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        && package.size > 0
}

/// All packages that can be installed on `architecture`, the highest version of each.
pub fn parse(text: &str, architecture: &str) -> Result<BTreeMap<String, Entry>, Failure> {
    let mut known: BTreeMap<String, Entry> = BTreeMap::new();
    for (number, paragraph) in text.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()).enumerate()
    {
        let mut fields: HashMap<&str, &str> = HashMap::new();
        for line in paragraph.lines().filter(|line| !line.starts_with([' ', '\t'])) {
            let (name, value) = line
                .split_once(':')
                .ok_or_else(|| refused(format!("paragraph {number} has a line without colon")))?;
            if fields.insert(name, value.trim()).is_some() {
                return Err(refused(format!("paragraph {number} has {name:?} twice")));
            }
        }
        let field = |name: &str| fields.get(name).copied().unwrap_or_default();
        if ![architecture, "all"].contains(&field("Architecture")) {
            continue;
        }
        let package = Package {
            name: field("Package").to_owned(),
            version: field("Version").to_owned(),
            architecture: field("Architecture").to_owned(),
            filename: field("Filename").to_owned(),
            size: field("Size").parse().unwrap_or(0),
            sha256: field("SHA256").to_owned(),
            essential: field("Essential") == "yes",
        };
        if !valid(&package) {
            return Err(refused(format!(
                "paragraph {number} ({:?}) has a malformed name, version, Filename, Size or SHA256",
                package.name
            )));
        }
        let mut depends = relations(field("Pre-Depends"));
        depends.extend(relations(field("Depends")));
        let entry = Entry {
            required: package.essential || field("Priority") == "required",
            depends,
            provides: relations(field("Provides")).into_iter().flatten().collect(),
            package,
        };
        match known.get(&entry.package.name) {
            Some(other) if compare(&other.package.version, &entry.package.version).is_ge() => {}
            _ => {
                known.insert(entry.package.name.clone(), entry);
            }
        }
    }
    Ok(known)
}

struct Chooser<'a> {
    known: &'a BTreeMap<String, Entry>,
    providers: HashMap<&'a str, Vec<(&'a str, Option<&'a str>)>>,
    chosen: Vec<&'a str>,
    set: HashSet<&'a str>,
}

impl<'a> Chooser<'a> {
    /// The packages that satisfy an alternative: itself first, then its providers by name.
    fn candidates(&self, wanted: &Alternative) -> Vec<&'a str> {
        let fits = |version: &str| {
            wanted.version.as_ref().is_none_or(|(relation, bound)| satisfies(version, relation, bound))
        };
        let mut found = Vec::new();
        if let Some((name, _)) =
            self.known.get_key_value(&wanted.name).filter(|(_, entry)| fits(&entry.package.version))
        {
            found.push(name.as_str());
        }
        for (provider, version) in self.providers.get(wanted.name.as_str()).into_iter().flatten() {
            // An unversioned Provides satisfies an unversioned dependency alone (Policy 7.5).
            if version.map_or(wanted.version.is_none(), fits) {
                found.push(provider);
            }
        }
        found
    }

    fn add(&mut self, name: &'a str, chain: &mut Vec<&'a str>) -> Result<(), Failure> {
        if !self.set.insert(name) {
            return Ok(());
        }
        chain.push(name);
        // The known packages are what names come from.
        if let Some(entry) = self.known.get(name) {
            for dependency in &entry.depends {
                let candidates: Vec<&str> =
                    dependency.iter().flat_map(|wanted| self.candidates(wanted)).collect();
                let pick = candidates.iter().find(|name| self.set.contains(**name)).or(candidates.first());
                let Some(pick) = pick else {
                    let names: Vec<&str> = dependency.iter().map(|wanted| wanted.name.as_str()).collect();
                    let message =
                        format!("nothing satisfies {} (wanted by {})", names.join(" | "), chain.join(" → "));
                    return Err(Failure::new(FailureKind::NotFound, "packages", message));
                };
                self.add(pick, chain)?;
            }
        }
        chain.pop();
        self.chosen.push(name);
        Ok(())
    }
}

/// Required and essential packages, `include`, and what they depend on; dependencies first, as far as they are no circles.
pub fn choose(known: &BTreeMap<String, Entry>, include: &[String]) -> Result<Vec<Package>, Failure> {
    let mut providers: HashMap<&str, Vec<(&str, Option<&str>)>> = HashMap::new();
    for (name, entry) in known {
        for provided in &entry.provides {
            let version = provided.version.as_ref().map(|(_, version)| version.as_str());
            providers.entry(&provided.name).or_default().push((name, version));
        }
    }
    let mut chooser = Chooser { known, providers, chosen: Vec::new(), set: HashSet::new() };
    let required = known.iter().filter(|(_, entry)| entry.required).map(|(name, _)| name.as_str());
    let mut seeds: Vec<&str> = required.collect();
    for name in include {
        let (name, _) = known.get_key_value(name).ok_or_else(|| {
            Failure::new(
                FailureKind::NotFound,
                name.as_str(),
                "the source's `include` names it, but the index does not have it",
            )
        })?;
        seeds.push(name);
    }
    for seed in seeds {
        chooser.add(seed, &mut Vec::new())?;
    }
    Ok(chooser.chosen.iter().filter_map(|name| known.get(*name)).map(|entry| entry.package.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paragraph(name: &str, more: &str) -> String {
        let hash = "0".repeat(64);
        format!(
            "Package: {name}\nVersion: 1.0\nArchitecture: amd64\nFilename: pool/{name}.deb\nSize: 3\nSHA256: {hash}\n{more}\n"
        )
    }

    fn names(text: &str, include: &[&str]) -> Result<Vec<String>, Failure> {
        let include: Vec<String> = include.iter().map(|name| (*name).to_owned()).collect();
        Ok(choose(&parse(text, "amd64")?, &include)?.into_iter().map(|package| package.name).collect())
    }

    #[test]
    fn closure_in_order() {
        let text = [
            paragraph("base", "Essential: yes\nPre-Depends: awk\nDepends: libc (>= 1.0), either | other\n"),
            paragraph("mawk", "Provides: awk\nDepends: libc\n"),
            paragraph("libc", ""),
            paragraph("other", ""),
            paragraph("extra", "Depends: loop\n"),
            paragraph("loop", "Depends: extra\n"),
            paragraph("unwanted", ""),
        ]
        .concat();
        assert_eq!(names(&text, &[]).expect("good"), ["libc", "mawk", "other", "base"]);
        assert_eq!(
            names(&text, &["extra"]).expect("good"),
            ["libc", "mawk", "other", "base", "loop", "extra"]
        );
        assert_eq!(names(&text, &["missing"]).expect_err("refused").kind, FailureKind::NotFound);
    }

    #[test]
    fn what_cannot_be_satisfied_is_told_with_its_chain() {
        let text = [
            paragraph("a", "Essential: yes\nDepends: b\n"),
            paragraph("b", "Depends: c (>> 1.0)\n"),
            paragraph("c", ""),
        ]
        .concat();
        let failure = names(&text, &[]).expect_err("refused");
        assert!(failure.message.contains("a → b"), "{}", failure.message);
    }

    #[test]
    fn hostile_paragraphs_are_refused() {
        let good = paragraph("a", "Essential: yes\n");
        for (from, to) in [
            ("pool/a.deb", "../a.deb"),
            ("pool/a.deb", "/etc/passwd"),
            ("Package: a", "Package: -a"),
            ("Size: 3", "Size: -3"),
            ("SHA256: 0", "SHA256: X"),
            ("Version: 1.0", "Version: 1.0\nVersion: 2.0"),
            ("Version: 1.0", "Version: 1 0"),
            ("Version: 1.0", "garbage"),
        ] {
            assert!(parse(&good.replace(from, to), "amd64").is_err(), "{from} → {to}");
        }
    }
}
