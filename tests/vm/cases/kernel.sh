# What differs from kernel to kernel: 6.1 (bookworm) is older than some of what is used elsewhere, 6.12 (trixie) has it all.

case_layers_stack() {
    local major minor
    IFS=. read -r major minor _ < <(uname -r)
    # Without `lowerdir+`, which came with 6.7, the layers are given in one string.
    if [ "$SUITE" = bookworm ]; then [ $((major * 100 + minor)) -lt 607 ] || fail "this kernel is not the older one"; fi
    environment layers
    # The account is in the upper of two lowers, the program in the lower.
    contains "accounts" "$(casemate exec layers -- cat /etc/passwd)" tester:x:1500:
    casemate exec --root layers -- sh -ec 'rm /bin/yes; echo changed >/etc/group; mkdir /new'
    casemate exec --root layers -- sh -ec '! [ -e /bin/yes ]; grep -q changed /etc/group; [ -d /new ]'
    casemate destroy layers
}

case_host_network_needs_landlock_that_scopes() {
    environment hosted '[runtime]' 'network = "host"'
    if [ "$SUITE" = bookworm ]; then
        refused 'network = "host" needs Linux 6.12' casemate start hosted
        is hosted built
    else
        # A device of the host's network, and an abstract socket of the host's that can't be reached.
        contains "devices inside" "$(casemate exec hosted -- ls /sys/class/net)" lo
        equal "network namespace" "$(casemate exec hosted -- readlink /proc/self/ns/net)" "$(readlink /proc/self/ns/net)"
    fi
    casemate destroy hosted
}

case_doctor_finds_nothing_broken() {
    local found
    found=$(casemate doctor) || fail "$found"
    contains "ids" "$found" "ids: a range of 65536 from 100000"
    contains "Landlock" "$found" "Landlock: "
    equal "AppArmor in the kernel" "$(cat /sys/module/apparmor/parameters/enabled)" Y
    contains "AppArmor" "$found" "ok        AppArmor: in force"
}

# The store does not use it yet: that file system and kernel have it, for the user's own files.
case_fsverity_is_there() {
    echo content >~/protected
    # shellcheck disable=SC2088
    fsverity enable ~/protected
    equal "digest" "$(fsverity measure ~/protected | cut -d' ' -f1)" "$(fsverity digest ~/protected | cut -d' ' -f1)"
    ! { echo more >>~/protected; } 2>/dev/null || fail "a file with fs-verity was written to"
    rm ~/protected
}

case_cgroup_controllers_are_delegated() {
    equal "cgroup version" "$(stat --file-system --format %T /sys/fs/cgroup)" cgroup2fs
    local controllers
    controllers=$(cat "/sys/fs/cgroup/user.slice/user-1500.slice/user@1500.service/cgroup.controllers")
    for controller in memory pids; do contains "the user's controllers" " $controllers " " $controller "; done
    # Enforced, not just accepted: what takes more than its limit is killed.
    ! systemd-run --user --quiet --wait --collect --pipe --property=MemoryMax=32M --property=MemorySwapMax=0 \
        bash -c 'head -c 100M /dev/zero | tail' >/dev/null 2>&1 || fail "100 MB were taken of 32"
}
