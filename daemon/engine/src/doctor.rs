//! What this machine has of what Casemate needs, and what to do where something is missing.

use casemate_worker::ids::IdMode;

use crate::Inner;
use crate::api::Finding;

fn finding(check: &str, severity: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { check: check.into(), severity: severity.into(), detail: detail.into(), remedy: remedy.into() }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

pub async fn examine(inner: &Inner) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.push(match inner.workers.ids() {
        IdMode::Range { uid_start, .. } => {
            finding("ids", "ok", format!("a range of 65536 from {uid_start}"), "")
        }
        IdMode::Single { reason, .. } => finding(
            "ids",
            "degraded",
            "no range of subordinate ids: root inside is you outside, and files have one owner",
            reason.clone(),
        ),
    });
    findings.push(match read("/proc/sys/user/max_user_namespaces").as_deref() {
        Some("0") => finding(
            "user namespaces",
            "broken",
            "switched off",
            "as root: sysctl -w user.max_user_namespaces=15000",
        ),
        _ => match read("/proc/sys/kernel/unprivileged_userns_clone").as_deref() {
            Some("0") => finding(
                "user namespaces",
                "broken",
                "switched off",
                "as root: sysctl -w kernel.unprivileged_userns_clone=1",
            ),
            _ => finding("user namespaces", "ok", "there", ""),
        },
    });
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        findings.push(finding(
            "AppArmor",
            "broken",
            "user namespaces without a profile have no rights",
            "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or install a profile for casemate-init",
        ));
    } else if read("/sys/module/apparmor/parameters/enabled").as_deref() == Some("Y") {
        findings.push(finding("AppArmor", "ok", "in force, and does not restrict user namespaces", ""));
    }
    let file_systems = read("/proc/filesystems").unwrap_or_default();
    findings.push(if file_systems.lines().any(|line| line.ends_with("\toverlay")) {
        finding("overlayfs", "ok", "in the kernel", "")
    } else {
        finding("overlayfs", "degraded", "not loaded yet", "as root: modprobe overlay")
    });
    let modules = read("/sys/kernel/security/lsm");
    findings.push(match modules {
        Some(list) if list.split(',').any(|name| name == "landlock") => {
            finding("Landlock", "ok", "in force", "")
        }
        Some(_) => finding(
            "Landlock",
            "degraded",
            "not in force: one layer less around workers, no host network",
            "boot with lsm=landlock,…",
        ),
        None => finding(
            "Landlock",
            "ok",
            "not told by this kernel; workers say at start which layers they have",
            "",
        ),
    });
    let bundle =
        ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
    findings.push(
        if bundle.iter().any(|path| std::path::Path::new(path).exists())
            || !inner.settings.ssl_cert_file.is_empty()
        {
            finding("certificates", "ok", "there", "")
        } else {
            finding(
                "certificates",
                "broken",
                "no CA certificates: nothing can be fetched",
                "install the package ca-certificates",
            )
        },
    );
    findings.push(match inner.store.free_bytes() {
        Ok(free) if free < 1 << 30 => {
            finding("disk", "degraded", format!("{free} bytes free for the store"), "free some space")
        }
        Ok(free) => finding("disk", "ok", format!("{} GiB free for the store", free >> 30), ""),
        Err(error) => finding("disk", "broken", error.to_string(), "check the store's file system"),
    });
    for (what, reason) in inner.tables().damage.reports() {
        findings.push(finding(
            "records",
            "broken",
            format!("{what}: {reason}"),
            "restore the file from a backup and restart casemated, or give it up (`casemate destroy`, `casemate release \
             remove`, `casemate snapshots --remove`); until then nothing is swept from the store",
        ));
    }
    findings.push(match inner.tool("pasta") {
        Some(path) => finding("private network", "ok", format!("pasta is {}", path.display()), ""),
        None => finding(
            "private network",
            "broken",
            "pasta is missing, without which there are \"none\" and \"host\" alone",
            "install the package passt",
        ),
    });
    findings.push(match inner.tool("nft") {
        Some(path) => finding("allow-lists", "ok", format!("nft is {}", path.display()), ""),
        None => finding(
            "allow-lists",
            "degraded",
            "nft is missing: manifests with [runtime] allow are refused",
            "install the package nftables",
        ),
    });
    findings.push(match inner.bus_proxy_found().await {
        Ok(path) => finding("session bus", "ok", format!("xdg-dbus-proxy is {}", path.display()), ""),
        Err(error) => finding(
            "session bus",
            "degraded",
            "environments can be granted no names on it",
            error.to_string(),
        ),
    });
    let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun");
    if let Err(error) = tun {
        findings.push(finding(
            "private network",
            "broken",
            format!("/dev/net/tun: {error}"),
            "as root: modprobe tun && chmod 666 /dev/net/tun (udev does so at boot)",
        ));
    }
    for name in ["casemate-fetch", "casemate-index", "casemate-unpack", "casemate-tree"] {
        let path = inner.settings.libexec.join(name);
        if !path.is_file() {
            findings.push(finding(
                "workers",
                "broken",
                format!("{} is missing", path.display()),
                "install Casemate anew",
            ));
        }
    }
    findings.push(match inner.cgroups.scopes() {
        Ok(scopes) => {
            let there = scopes.controllers();
            let missing: Vec<&str> =
                ["cpu", "io", "memory", "pids"].into_iter().filter(|name| !there.contains(*name)).collect();
            let maker = format!("made by {}", scopes.maker());
            match missing.is_empty() {
                true => finding("control groups", "ok", format!("{maker}: all limits can be enforced"), ""),
                false => finding(
                    "control groups",
                    "degraded",
                    format!("{maker}, without {}: limits that need them are refused", missing.join(", ")),
                    scopes.remedy(),
                ),
            }
        }
        Err(reason) => finding(
            "control groups",
            "degraded",
            format!("{reason}: limits are refused, and nothing can be paused"),
            "run casemated under systemd's user manager, or in a cgroup v2 directory of yours",
        ),
    });
    findings
}
