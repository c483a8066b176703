//! A root filesystem archive becomes a release.

use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::World;

use crate::measure::{Report, series, time};

const ROUNDS: usize = 7;

/// The environment's root as an archive, before and after one file in twenty got another content.
fn archives(world: &World) -> [PathBuf; 2] {
    let directory = world.project();
    let pack = |name: &str| {
        // Neither /proc nor the workspace, in which the archives lie: these are mounts.
        let pack = ["--root", "running", "--", "tar", "-C", "/", "--one-file-system", "-cf", "-", "."];
        let output = world.exec(&pack);
        assert!(output.status.success(), "{}", casemate_tests::text(&output.stderr));
        let path = directory.join(name);
        std::fs::write(&path, output.stdout).expect("archive");
        path
    };
    let first = pack("first.tar");
    let change = "find / -xdev -type f | sort | awk 'NR % 20 == 0' | while IFS= read -r f; do echo changed >> \"$f\" || exit 1; done";
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
    for round in 0..ROUNDS {
        // An empty store each time: nothing of the first archive is known.
        let fresh = World::new();
        let mut tars = |world: &World| {
            new_tar.add(extract(world, &archives[0]));
            known_tar.add(extract(world, &archives[1]));
        };
        if round % 2 == 1 {
            tars(world);
        }
        time(&mut Command::new("sync"));
        new.add(time(&mut fresh.casemate(&["release", "import", "first", first])));
        time(&mut Command::new("sync"));
        known.add(time(&mut fresh.casemate(&["release", "import", "second", second])));
        drop(fresh);
        time(&mut Command::new("sync"));
        if round % 2 == 0 {
            tars(world);
        }
    }
    report.ratio("import, all new", &new, "tar -x; sync", &new_tar, Some(1.25));
    report.ratio("import, 95 % known", &known, "tar -x; sync", &known_tar, Some(0.6));
}
