//! Starting a command.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use casemate_tests::{DEADLINE, World};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::measure::{Report, series, time};
use crate::peers;

const RUNNING: usize = 200;
const STOPPED: usize = 60;

/// A command in an environment that runs, beside a sandbox made for it.
pub fn running(world: &World, report: &mut Report) {
    let root = peers::root(world);
    let [mut ours, mut theirs] = series();
    for _ in 0..RUNNING {
        ours.add(time(&mut world.casemate(&["exec", "running", "--", "true"])));
        theirs.add(time(&mut peers::bubblewrap(world, &root, &["true"])));
    }
    report.ratio("exec, running", &ours, "bwrap … true", &theirs, Some(1.0));
}

/// Start, command, stop: until nothing of the environment is left.
fn whole_life(world: &World, name: &str) -> (Duration, Duration) {
    let shown: serde_json::Value = serde_json::from_str(&world.run(&["show", name, "--json"])).expect("JSON");
    let id = shown["id"].as_str().expect("id");
    let notify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).expect("inotify");
    notify.add_watch(&world.runtime(), AddWatchFlags::IN_DELETE).expect("watch");
    let begin = Instant::now();
    let returned = time(&mut world.casemate(&["exec", name, "--", "true"]));
    loop {
        let events = notify.read_events().unwrap_or_default();
        if events.iter().any(|event| event.name.as_ref().is_some_and(|name| name == id)) {
            return (returned, begin.elapsed());
        }
        assert!(begin.elapsed() < DEADLINE, "the environment does not stop");
        let mut wait = [PollFd::new(notify.as_fd(), PollFlags::POLLIN)];
        poll(&mut wait, PollTimeout::from(1000u16)).expect("poll");
    }
}

/// A command in an environment that does not run, beside a container made for it.
pub fn stopped(world: &World, report: &mut Report) {
    let root = peers::root(world);
    let mut range = peers::crun(world, &root, true);
    let mut single = peers::crun(world, &root, false);
    let [mut returned, mut gone, mut with_range, mut with_one, mut alone, mut connected] = series();
    for _ in 0..STOPPED {
        let (until_returned, until_gone) = whole_life(world, "stopped");
        returned.add(until_returned);
        gone.add(until_gone);
        with_range.add(time(&mut range));
        with_one.add(time(&mut single));
    }
    // Apart from the peers: what the kernel clears away of a connected network goes on for long after its end.
    for _ in 0..STOPPED {
        alone.add(whole_life(world, "stopped").0);
        connected.add(whole_life(world, "connected").0);
    }
    report.ratio("exec, stopped: start, true, stop", &gone, "crun run, range of ids", &with_range, Some(1.0));
    report.ratio("the same", &gone, "crun run, one id", &with_one, None);
    report.ratio("the same, until exec returns", &returned, "crun run, range of ids", &with_range, None);
    report.ratio("private network, until it returns", &connected, "the same without one", &alone, None);
}
