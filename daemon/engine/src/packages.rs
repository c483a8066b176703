//! What runs inside sandboxes to install Debian packages, and how its output is read.
//!
//! Everything that comes back was written by the image's own programs, so it is read as a stranger's: bounded, strictly,
//! and believed only as far as hashes bear it out.

use std::collections::BTreeMap;

use casemate_manifest::LockedPackage;

use crate::error::Error;

/// Most bytes of output that are read; a listing of 2,000 packages has about 4 MiB.
pub const OUTPUT_MAX: usize = 32 << 20;

/// Installs a base system out of unpacked packages: the steps of debootstrap's second stage. The packages are in
/// `/run/casemate/packages`, in an order in which they can be unpacked.
/// Arguments, never text of the script: mirror, suite, component.
pub const CONFIGURE_BASE: &str = r#"set -e
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 022
mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates /var/lib/dpkg/triggers /etc/apt /tmp /var/tmp
chmod 1777 /tmp /var/tmp
[ -e /var/lib/dpkg/status ] || : > /var/lib/dpkg/status
[ -e /etc/passwd ] || cp /usr/share/base-passwd/passwd.master /etc/passwd
[ -e /etc/group ] || cp /usr/share/base-passwd/group.master /etc/group
[ -e /usr/bin/awk ] || ln -s mawk /usr/bin/awk
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
cd /run/casemate/packages
install() { dpkg --force-unsafe-io --force-depends --install "$@"; }
install *_base-passwd.deb
install *_base-files.deb
dpkg --force-unsafe-io --force-depends --unpack *.deb
dpkg --force-unsafe-io --force-depends --force-configure-any --configure --pending
dpkg --audit
rm -f /usr/sbin/policy-rc.d
printf 'deb %s %s %s\n' "$1" "$2" "$3" > /etc/apt/sources.list
: > /etc/machine-id
rm -rf /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/log/*.log /var/log/apt/* /var/cache/apt/*.bin
"#;

const APT: &str = "apt-get -q -y --no-install-recommends -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 -o Acquire::Languages=none";

/// Stage 1: refresh the indexes, tell what would be installed, and download it. The output is for [`read_resolution`].
/// Arguments, never text of the script: hosts that no proxy serves (`no_proxy`), then packages.
pub fn resolve() -> String {
    format!(
        r#"set -e
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /var/lib/apt/lists/partial /var/cache/apt/archives/partial
[ -z "$1" ] || export no_proxy="$1"
shift
{APT} update >&2
uris=$({APT} -qq --print-uris install -- "$@")
echo "== uris"
printf '%s\n' "$uris"
echo "== show"
printf '%s\n' "$uris" | while read -r uri file rest; do
    case $file in *.deb) ;; *) continue ;; esac
    base=${{file%.deb}}; name=${{base%%_*}}; more=${{base#*_}}; version=${{more%_*}}; architecture=${{more##*_}}
    version=$(printf '%s' "$version" | sed 's/%3a/:/g')
    case $architecture in all) query=$name=$version ;; *) query=$name:$architecture=$version ;; esac
    apt-cache show --no-all-versions "$query"
    echo
done
echo "== end"
{APT} --download-only install -- "$@" >&2
"#
    )
}

/// Stage 2: install exactly the files in `/run/casemate/packages`, without network. Arguments: what the manifest asks for.
pub fn install() -> String {
    format!(
        r#"set -e
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 022
made=
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    made=1
fi
{APT} --allow-downgrades -o Debug::NoLocking=1 -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Options::=--force-confdef install /run/casemate/packages/*.deb
[ -z "$made" ] || rm -f /usr/sbin/policy-rc.d
for file in /run/casemate/packages/*.deb; do dpkg-deb -f "$file" Package; done | xargs apt-mark auto > /dev/null
if [ $# -gt 0 ]; then apt-mark manual "$@" > /dev/null; fi
rm -rf /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/log/apt/* /var/log/dpkg.log /var/log/alternatives.log /var/cache/apt/*.bin
"#
    )
}

fn nonsense(message: impl Into<String>) -> Error {
    Error::Package { message: format!("the package manager's answer makes no sense: {}", message.into()) }
}

/// Percent-encoding undone: apt writes `+` as `%2b`.
fn decode(url: &str) -> String {
    let mut plain = String::new();
    let mut rest = url;
    while let Some((before, after)) = rest.split_once('%') {
        plain.push_str(before);
        match after
            .get(..2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .filter(u8::is_ascii_graphic)
        {
            Some(byte) => {
                plain.push(char::from(byte));
                rest = &after[2..];
            }
            None => {
                plain.push('%');
                rest = after;
            }
        }
    }
    plain + rest
}

/// Read what [`resolve`] printed. `requested` are the manifest's own names.
pub fn read_resolution(output: &str, requested: &[String]) -> Result<Vec<LockedPackage>, Error> {
    let (_, rest) = output.split_once("== uris\n").ok_or_else(|| nonsense("no list of URLs"))?;
    let (uris, rest) = rest.split_once("== show\n").ok_or_else(|| nonsense("no package records"))?;
    let (shown, _) = rest.split_once("== end\n").ok_or_else(|| nonsense("it breaks off"))?;
    // By file name at the end of the URL, since that is how both halves name a package.
    let mut urls = BTreeMap::new();
    for line in uris.lines().filter(|line| !line.is_empty()) {
        let url = line
            .strip_prefix('\'')
            .and_then(|rest| rest.split_once('\''))
            .map(|(url, _)| url)
            .ok_or_else(|| nonsense(format!("{line:?}")))?;
        let plain = decode(url);
        let file = plain.rsplit('/').next().unwrap_or_default().to_owned();
        urls.insert(file, (url.to_owned(), plain));
    }
    let mut packages: BTreeMap<(String, String), LockedPackage> = BTreeMap::new();
    for paragraph in shown.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
        let field = |name: &str| {
            paragraph
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.trim().to_owned())
                .ok_or_else(|| nonsense(format!("a package record without {name}")))
        };
        let name = field("Package")?;
        let filename = field("Filename")?;
        let file = filename.rsplit('/').next().unwrap_or_default();
        let (url, plain) = urls.get(file).ok_or_else(|| nonsense(format!("{name} has no URL")))?.clone();
        if !plain.ends_with(&filename) {
            return Err(nonsense(format!("the URL of {name} does not end in its file name")));
        }
        let package = LockedPackage {
            requested: requested.iter().any(|wanted| wanted.split('=').next() == Some(&name)),
            version: field("Version")?,
            architecture: field("Architecture")?,
            sha256: field("SHA256")?,
            size: field("Size")?.parse().map_err(|_| nonsense(format!("the size of {name}")))?,
            url,
            name,
        };
        package.check().map_err(|what| nonsense(format!("package {:?}: {what}", package.name)))?;
        packages.insert((package.name.clone(), package.architecture.clone()), package);
    }
    if packages.len() != urls.len() {
        return Err(nonsense(format!("{} URLs but {} packages", urls.len(), packages.len())));
    }
    Ok(packages.into_values().collect())
}

/// The name under which apt's cache and stage 2 have a package.
pub fn file_name(package: &LockedPackage) -> String {
    format!("{}_{}_{}.deb", package.name, package.version.replace(':', "%3a"), package.architecture)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "== uris\n'https://m.example/debian/pool/main/j/jq/jq_1.6-2.1_amd64.deb' jq_1.6-2.1_amd64.deb 3 SHA256:00\n\
        == show\nPackage: jq\nVersion: 1.6-2.1\nArchitecture: amd64\nFilename: pool/main/j/jq/jq_1.6-2.1_amd64.deb\nSize: 3\nSHA256: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n\n\n== end\n";

    #[test]
    fn resolution() {
        let packages = read_resolution(OUTPUT, &["jq".to_owned()]).expect("readable");
        assert_eq!(packages.len(), 1);
        assert_eq!(packages[0].url, "https://m.example/debian/pool/main/j/jq/jq_1.6-2.1_amd64.deb");
        assert!(packages[0].requested);
    }

    #[test]
    fn a_plus_in_a_url_is_a_plus() {
        assert_eq!(decode("https://m/a%2bb%zz%"), "https://m/a+b%zz%");
    }

    #[test]
    fn a_resolution_that_breaks_off_or_contradicts_itself_is_refused() {
        for bad in [
            OUTPUT.replace("== end\n", ""),
            OUTPUT.replace("Filename: pool", "Filename: other"),
            OUTPUT.replace("SHA256: aa", "SHA: aa"),
            OUTPUT.replace("Package: jq", "Packag: jq"),
            // These become names of files.
            OUTPUT.replace("Package: jq", "Package: ../jq"),
            OUTPUT.replace("Package: jq", "Package: /home/u/jq"),
            OUTPUT.replace("Version: 1.6-2.1", "Version: 1/../../x"),
            OUTPUT.replace("Architecture: amd64", "Architecture: ../x"),
            OUTPUT.replace("SHA256: aaaa", "SHA256: ../a"),
            OUTPUT.replace("https://", "file://"),
        ] {
            assert!(read_resolution(&bad, &[]).is_err(), "{bad}");
        }
    }
}
