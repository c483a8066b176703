//! A root filesystem archive becomes a release.

use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::World;

use crate::measure::{Report, series, time};

const ROUNDS: usize = 9;

/// The environment's root as an archive, before and after one file in twenty got another content.
fn archives(world: &World) -> [PathBuf; 2] {
    let directory = world.project();
    let pack = |name: &str| {
        // Without mounts, and without what is the user's and not root's.
        let pack = "tar -C / --one-file-system --exclude=./home --exclude=./workspace -cf - .";
        let output = world.exec(&["--root", "running", "--", "sh", "-c", pack]);
        assert!(output.status.success(), "{}", casemate_tests::text(&output.stderr));
        let path = directory.join(name);
        std::fs::write(&path, output.stdout).expect("archive");
        path
    };
    let first = pack("first.tar");
    let change = "find / -xdev -path /home -prune -o -type f -print | sort | awk 'NR % 20 == 0' | while IFS= read -r f; do echo changed >> \"$f\" || exit 1; done";
    let output = world.exec(&["--root", "running", "--", "sh", "-c", change]);
    assert!(output.status.success(), "{}", casemate_tests::text(&output.stderr));
    [first, pack("second.tar")]
}

/// `tar -x` and `sync` into a directory that then goes again.
fn extract(world: &World, archive: &Path) -> std::time::Duration {
    let target = world.project().join("extracted");
    std::fs::create_dir(&target).expect("directory");
    let script = "tar -xf \"$0\" -C \"$1\" && sync";
    let taken = time(world.command("sh").args(["-c", script]).arg(archive).arg(&target));
    time(Command::new("sh").args(["-c", "chmod -R u+rwX \"$0\" && rm -r \"$0\" && sync"]).arg(&target));
    taken
}

pub fn measure(world: &World, report: &mut Report) {
    let archives = archives(world);
    let [first, second] = archives.each_ref().map(|path| path.to_str().expect("UTF-8"));
    let [mut new, mut known, mut new_tar, mut known_tar] = series();
    let settle = || time(&mut Command::new("sync"));
    for round in 0..ROUNDS {
        // In another order each time: disks have caches, and some have allowances, that whoever comes first uses up.
        for turn in 0..3 {
            settle();
            match (round + turn) % 3 {
                0 => {
                    // An empty store: nothing of the first archive is known, nineteen twentieths of the second are.
                    let fresh = World::new();
                    new.add(time(&mut fresh.casemate(&["release", "import", "first", first])));
                    settle();
                    known.add(time(&mut fresh.casemate(&["release", "import", "second", second])));
                }
                1 => new_tar.add(extract(world, &archives[0])),
                _ => known_tar.add(extract(world, &archives[1])),
            }
        }
    }
    report.ratio("import, all new", &new, "tar -x; sync", &new_tar, Some(1.25));
    report.ratio("import, 95 % known", &known, "tar -x; sync", &known_tar, Some(0.6));
}
