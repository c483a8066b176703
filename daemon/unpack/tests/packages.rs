//! Real packages from the mirror that this machine's apt uses: what `dpkg-deb` and `tar` make of them, we make of them.

mod archives;

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use archives::Place;

fn output(command: &mut Command) -> String {
    let output = command.env("LC_ALL", "C").output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Type, mode, time, content or target; of directories the type alone, since the order decides about the rest.
fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, i64, Vec<u8>)> {
    let mut seen = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let full = root.join(&path);
        let meta = full.symlink_metadata().unwrap();
        if meta.is_dir() {
            left.extend(std::fs::read_dir(&full).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
            seen.insert(path, (meta.mode() & 0o170_000, 0, Vec::new()));
        } else if meta.is_symlink() {
            let target = std::fs::read_link(&full).unwrap().into_os_string().into_encoded_bytes();
            let merged = path.components().count() == 1 && target.starts_with(b"usr/");
            seen.insert(path, (meta.mode(), if merged { 0 } else { meta.mtime() }, target));
        } else {
            seen.insert(path, (meta.mode(), meta.mtime(), std::fs::read(&full).unwrap()));
        }
    }
    seen
}

#[test]
fn the_base_of_debian() {
    let installed =
        output(Command::new("dpkg-query").args(["-W", "-f", "${Package} ${Essential} ${Priority}\n"]));
    let wanted: Vec<_> = installed
        .lines()
        .filter(|line| line.contains(" yes ") || line.ends_with(" required"))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    assert!(wanted.len() >= 20, "{wanted:?}");
    let depends = output(
        Command::new("apt-cache")
            .args([
                "depends",
                "--recurse",
                "--installed",
                "--no-recommends",
                "--no-suggests",
                "--no-conflicts",
            ])
            .args(["--no-breaks", "--no-replaces", "--no-enhances"])
            .args(&wanted),
    );
    let mut names: Vec<_> = depends
        .lines()
        .filter(|line| line.starts_with(|first: char| first.is_ascii_alphanumeric()) && !line.contains(':'))
        .collect();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() >= 50, "{names:?}");
    let downloads = tempfile::tempdir().unwrap();
    output(Command::new("apt-get").arg("download").args(&names).current_dir(downloads.path()));
    let mut files: Vec<_> =
        std::fs::read_dir(downloads.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let packages: Vec<_> = files
        .iter()
        .map(|path| (path.file_name().unwrap().to_str().unwrap(), std::fs::read(path).unwrap()))
        .collect();

    let place = Place::new();
    let result = place.packages(&packages).unwrap();
    assert!(result.members > 5000, "{result:?}");

    let reference = tempfile::tempdir().unwrap();
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32", "libo32"] {
        if place.root().join(name).exists() {
            std::fs::create_dir_all(reference.path().join("usr").join(name)).unwrap();
            symlink(format!("usr/{name}"), reference.path().join(name)).unwrap();
        }
    }
    for file in &files {
        let mut contents =
            Command::new("dpkg-deb").arg("--fsys-tarfile").arg(file).stdout(Stdio::piped()).spawn().unwrap();
        let mut tar = Command::new("tar");
        tar.args(["-xp", "--no-same-owner", "--keep-directory-symlink", "-C"]).arg(reference.path());
        output(tar.stdin(contents.stdout.take().unwrap()));
        assert!(contents.wait().unwrap().success());
    }
    let (expected, found) = (tree(reference.path()), tree(&place.root()));
    for (path, seen) in &expected {
        assert!(found.get(path) == Some(seen), "{} differs", path.display());
    }
    assert_eq!(found.len(), expected.len());
}
