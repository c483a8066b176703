//! Descriptors of what was started, many times.

use std::time::Instant;

use casemate_tests::{World, soak, text};

/// Whatever it takes to serve an environment, its sessions have standard input, output and error, and nothing else; started
/// with the environment or into it, as the user or as root.
#[test]
fn three_descriptors_in_every_start() {
    let world = World::with_release();
    let policy = "[session_bus]\ntalk = [\"org.example.*\"]\n[namespaces]\nnested = true\n";
    std::fs::write(world.config().join("policy.toml"), policy).expect("policy");
    let small = "[runtime]\nnetwork = \"none\"\nsudo = true\n";
    let large = "[runtime]\nsudo = true\nnested_namespaces = true\nports = [\"127.0.0.1:18471:80\"]\ncommand = [\"sleep\", \"infinity\"]\n\
                 [gui.session_bus]\ntalk = [\"org.example.A\"]\n";
    for (name, manifest) in [("small", small), ("large", large)] {
        world.write_manifest(manifest);
        world.run(&["build", name, "--manifest", &world.manifest()]);
    }
    // `ls` opens the directory that it lists, as 3.
    let look = |environment: &[&str]| {
        let output = world.exec(&[environment, &["--", "ls", "/proc/self/fd"]].concat());
        assert!(output.status.success(), "{environment:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "0\n1\n2\n3\n", "{environment:?}");
    };
    let begin = Instant::now();
    let starts = soak(10_000, 60);
    for number in 0..starts {
        match number % 20 {
            // All that there can be, and its network: some 100 ms each.
            0 => {
                world.run(&["start", "large"]);
                look(&["large"]);
                look(&["--root", "large"]);
                world.run(&["stop", "large"]);
            }
            odd if odd % 2 == 1 => look(&["--root", "small"]),
            _ => look(&["small"]),
        }
    }
    eprintln!("{starts} starts in {:?}", begin.elapsed());
}
