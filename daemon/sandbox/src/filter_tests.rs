//! The filter beside podman's default profile. `tests/podman-seccomp.json` is `/usr/share/containers/seccomp.json` of Debian 12's
//! golang-github-containers-common 0.50.1+ds1-4 (Apache-2.0), unchanged.

use std::collections::BTreeSet;

use seccompiler::TargetArch;
use serde_json::Value;

use super::*;
use crate::syscalls::{AARCH64, X86_64};

/// Calls that are newer than that version; its later ones allow them, too. They do what older calls do with other arguments.
const LATER: [&str; 6] =
    ["cachestat", "fchmodat2", "futex_requeue", "futex_wait", "futex_wake", "map_shadow_stack"];

/// What podman allows by arguments alone; `arguments_are_judged` tries ours.
const BY_ARGUMENTS: [&str; 2] = ["personality", "socket"];

/// Capabilities that podman leaves to a container.
const KEPT: [&str; 1] = ["CAP_SYS_CHROOT"];

fn words<'a>(value: &'a Value, key: &str) -> Vec<&'a str> {
    value[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Names that podman allows on `architecture`: whatever their arguments, and by their arguments.
fn podman(architecture: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let profile: Value = serde_json::from_str(include_str!("../tests/podman-seccomp.json")).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    let (mut whatever, mut judged) = (BTreeSet::new(), BTreeSet::new());
    for rule in profile["syscalls"].as_array().unwrap() {
        let (only, never) = (&rule["includes"], &rule["excludes"]);
        let elsewhere = !words(only, "arches").is_empty() && !words(only, "arches").contains(&architecture);
        let lacking = words(only, "caps").iter().any(|capability| !KEPT.contains(capability));
        let excluded = words(never, "arches").contains(&architecture)
            || words(never, "caps").iter().any(|capability| KEPT.contains(capability));
        if rule["action"] != "SCMP_ACT_ALLOW" || elsewhere || lacking || excluded {
            continue;
        }
        let free = rule["args"].as_array().is_none_or(Vec::is_empty);
        let names = words(rule, "names").into_iter().map(str::to_owned);
        if free { &mut whatever } else { &mut judged }.extend(names);
    }
    assert!(whatever.len() > 250, "the profile is read: {}", whatever.len());
    (whatever, judged)
}

#[test]
fn no_call_that_podman_refuses() {
    for (architecture, ours) in [("amd64", X86_64), ("arm64", AARCH64)] {
        let (whatever, judged) = podman(architecture);
        let more: Vec<_> = ours
            .iter()
            .map(|(_, name)| *name)
            .filter(|name| !whatever.contains(*name) && !LATER.contains(name))
            .filter(|name| !(judged.contains(*name) && BY_ARGUMENTS.contains(name)))
            .collect();
        assert!(more.is_empty(), "allowed by us and not by podman on {architecture}: {more:?}");
    }
}

#[test]
fn lists_compile_for_both_architectures() {
    for (architecture, list) in [(TargetArch::x86_64, X86_64), (TargetArch::aarch64, AARCH64)] {
        let numbers: BTreeMap<_, _> =
            list.iter().map(|(number, _)| (*number, SeccompAction::Allow)).collect();
        assert_eq!(numbers.len(), list.len(), "no number is listed twice");
        verdicts::compile(&numbers, &SeccompAction::Errno(libc::ENOSYS as u32), architecture).unwrap();
    }
}

/// The kernel's own answer, in a thread that alone is bound.
fn errno(call: impl FnOnce() -> libc::c_long) -> i32 {
    match call() {
        -1 => std::io::Error::last_os_error().raw_os_error().unwrap(),
        descriptor_or_value => {
            assert!(descriptor_or_value >= 0);
            0
        }
    }
}

fn personality(value: u64) -> i32 {
    // SAFETY: takes a number and changes this thread alone.
    errno(|| unsafe { libc::syscall(libc::SYS_personality, value) })
}

fn netlink(protocol: i32) -> i32 {
    // SAFETY: takes numbers; the descriptor ends with the test.
    errno(|| unsafe { libc::syscall(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, protocol) })
}

#[test]
fn arguments_are_judged() {
    const NO_RANDOM_ADDRESSES: u64 = 0x4_0000;
    let ask = || {
        let personalities = [NO_RANDOM_ADDRESSES, NO_RANDOM_ADDRESSES | 1 << 32, 0x8, 0, 0xffff_ffff];
        (personalities.map(personality), [libc::NETLINK_AUDIT, libc::NETLINK_ROUTE].map(netlink))
    };
    let free = std::thread::spawn(ask).join().unwrap();
    assert_eq!(free, ([0; 5], [0; 2]), "without the filter all of it succeeds");
    let bound = std::thread::spawn(move || {
        Filters::compile(Circumstances::default()).unwrap().apply().unwrap();
        ask()
    });
    let eperm = libc::EPERM;
    assert_eq!(bound.join().unwrap(), ([eperm, eperm, 0, 0, 0], [libc::EINVAL, 0]));
}
