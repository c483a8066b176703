# Limits that the kernel enforces, in scopes of the user's systemd manager: what is beyond them ends inside, and is told.

# All that there is to delegate; by itself systemd leaves out some of it.
root_every_controller_is_delegated() {
    mkdir -p /etc/systemd/system/user@.service.d
    printf '[Service]\nDelegate=cpu io memory pids\n' >/etc/systemd/system/user@.service.d/delegate.conf
    systemctl daemon-reload
    systemctl restart user@1500.service
    within 30 "the user's manager" test -S /run/user/1500/systemd/private
    local found
    found=$(as_tester casemate doctor)
    contains "doctor" "$found" "control groups: made by systemd's user manager: all limits can be enforced"
}

group_of() { # NAME
    echo "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$(init_of "$(id_of "$1")")/cgroup")"
}

property() { # NAME PROPERTY
    local path
    path=$(busctl --user --json=short call org.casemate.Casemate1 /org/casemate/Casemate1 org.casemate.Casemate1.Manager \
        GetEnvironment 'sa{sv}' "$1" 0 | grep -o '/org/[^"]*')
    busctl --user get-property org.casemate.Casemate1 "$path" org.casemate.Casemate1.Environment "$2" | cut -d' ' -f2-
}

limited() {
    environment limited '[runtime.resource_limits]' 'memory_limit_mb = 64' 'swap_limit_mb = 0' 'pids = 64' 'cpu_shares = 512' \
        'cpus = 0.5' 'io_weight = 50'
}

case_each_environment_has_a_scope() {
    environment demo
    casemate start demo
    local group unit
    group=$(group_of demo)
    contains "its group" "$group" "/user@1500.service/casemate.slice/casemate-$(id_of demo)-"
    unit=$(basename "$group")
    equal "the scope" "$(of "$unit" ActiveState)" active
    equal "delegation" "$(of "$unit" Delegate)" yes
    # Init sees itself at the top: its namespace was made inside.
    equal "it is at the top inside" "$(casemate exec demo -- cat /proc/self/cgroup)" "0::/"
    systemctl --user stop casemated
    equal "the scope, without the daemon" "$(of "$unit" ActiveState)" active
    equal "what it holds" "$(casemate exec demo -- echo here)" here
    casemate stop demo
    collected() { [ ! -e "$group" ]; }
    within 10 "the scope is collected" collected
}

case_what_is_asked_for_is_in_force() {
    limited
    casemate start limited
    local group
    group=$(group_of limited)
    equal memory "$(cat "$group/memory.max")" 67108864
    equal swap "$(cat "$group/memory.swap.max")" 0
    equal pids "$(cat "$group/pids.max")" 64
    equal weight "$(cat "$group/cpu.weight")" 50
    equal quota "$(cat "$group/cpu.max")" "50000 100000"
    equal "weight of i/o" "$(cat "$group/io.weight")" "default 50"
    # Live, here and on record.
    casemate limits limited pids=100 cpus=max memory_limit_mb=96
    equal "pids, changed" "$(cat "$group/pids.max")" 100
    equal "quota, lifted" "$(cat "$group/cpu.max")" "max 100000"
    equal "memory, changed" "$(cat "$group/memory.max")" 100663296
    casemate restart limited
    group=$(group_of limited)
    equal "pids, after a restart" "$(cat "$group/pids.max")" 100
    casemate limits limited pids=64 cpus=0.5 memory_limit_mb=64
    contains "limits" "$(casemate limits limited)" "cpus = 0.5"
    casemate stop limited
}

case_a_memory_bomb_is_killed_inside_and_told() {
    limited
    casemate start limited
    stdbuf --output=L busctl --user --json=short monitor org.casemate.Casemate1 >~/signals &
    local monitor=$! status=0 kills
    # Anything that is signalled shows that it listens.
    hears() { casemate limits limited pids=64 && [ -s ~/signals ]; }
    within 30 "the monitor" hears
    casemate exec limited -- dd if=/dev/zero of=/dev/null bs=200M count=1 || status=$?
    equal "status of the bomb" $status 137
    kills=$(property limited OomKills)
    within 10 "the signal" grep -q '"member":"OutOfMemory"' ~/signals
    kill "$monitor"
    [ "$kills" -ge 1 ] || fail "OomKills is $kills"
    is limited running || fail "the environment went with the bomb"
    contains "show" "$(casemate show limited)" "killed for want of memory"
    # Beneath the limit it lives.
    casemate exec limited -- dd if=/dev/zero of=/dev/null bs=20M count=1
    casemate limits limited memory_limit_mb=400
    casemate exec limited -- dd if=/dev/zero of=/dev/null bs=200M count=1
    casemate limits limited memory_limit_mb=64
    casemate stop limited
}

milliseconds() { # of five times COMMAND, the middle one
    local began ended
    for _ in 1 2 3 4 5; do
        began=$(date +%s%N)
        "$@" >/dev/null
        ended=$(date +%s%N)
        echo $(((ended - began) / 1000000))
    done | sort -n | sed -n 3p
}

# others_answer USUAL: the daemon, and another environment, within five times of what is usual.
others_answer() {
    local now
    now=$(milliseconds casemate exec demo -- true)
    echo "exec in another environment: usually $1 ms, now $now ms"
    [ "$now" -le $((5 * $1)) ] || fail "exec took $now ms, usually $1 ms"
    casemate list >/dev/null
}

case_a_fork_bomb_meets_its_limit() {
    environment demo
    limited
    casemate start demo
    casemate start limited
    local usual group
    usual=$(milliseconds casemate exec demo -- true)
    group=$(group_of limited)
    # shellcheck disable=SC2016
    casemate exec limited -- sh -c 'bomb() { bomb | bomb & bomb; }; bomb' >/dev/null 2>&1 &
    full() { [ "$(sed -n 's/^max //p' "$group/pids.events")" -gt 0 ]; }
    within 60 "the limit on processes is met" full
    [ "$(cat "$group/pids.current")" -le 64 ] || fail "there are $(cat "$group/pids.current") processes"
    others_answer "$usual"
    casemate kill limited
    wait
    is limited built
    casemate stop demo
}

case_a_memory_bomb_leaves_others_alone() {
    environment demo
    limited
    casemate start demo
    casemate start limited
    local usual
    usual=$(milliseconds casemate exec demo -- true)
    casemate exec limited -- sh -c 'while :; do dd if=/dev/zero of=/dev/null bs=200M count=1; done' >/dev/null 2>&1 &
    bombed() { [ "$(property limited OomKills)" -ge 1 ]; }
    within 60 "processes are killed" bombed
    others_answer "$usual"
    casemate kill limited
    wait
    casemate stop demo
}

case_inotify_and_descriptors_run_out_inside() {
    environment demo
    limited
    casemate start demo
    casemate limits limited pids=400 memory_limit_mb=256
    casemate start limited
    local usual
    usual=$(milliseconds casemate exec demo -- true)
    # An instance each, until there are no more.
    casemate exec limited -- sh -c 'n=0; while [ $n -lt 300 ]; do inotifyd - /tmp:c & n=$((n + 1)); done; wait' >~/inotify 2>&1 &
    exhausted() { grep -qi 'too many open files\|inotify' ~/inotify; }
    within 120 "inotify runs out" exhausted
    others_answer "$usual"
    casemate kill limited
    wait
    casemate start limited
    # shellcheck disable=SC2016
    casemate exec limited -- sh -c 'n=10; while eval "exec $n</dev/null"; do n=$((n + 1)); done; sleep 100' >~/descriptors 2>&1 &
    exhausted() { grep -qi 'too many\|bad file\|can.t' ~/descriptors; }
    within 120 "descriptors run out" exhausted
    others_answer "$usual"
    casemate kill limited
    wait
    casemate limits limited pids=64 memory_limit_mb=64
    casemate stop demo
}

case_a_disk_filler_leaves_others_alone() {
    environment demo
    environment filler
    mkdir -p ~/more
    printf 'manifest_version = 1\n[base]\nrelease = "local/busybox"\n' >~/more/casemate.toml
    casemate start demo
    casemate start filler
    local usual said status=0
    usual=$(milliseconds casemate exec demo -- true)
    said=$(casemate exec filler -- dd if=/dev/zero of=/var/tmp/fill bs=1M 2>&1) || status=$?
    equal "status of the filler" "$status" 1
    contains "what it heard" "$said" "No space left"
    others_answer "$usual"
    # Nor does a daemon need room to start, to find what runs, and to say why it cannot build.
    systemctl --user kill --signal=KILL casemated
    equal "what the other one says" "$(casemate exec demo -- echo here)" here
    is filler running || fail "the environment went with its disk"
    said=$(cd ~/more && casemate build more 2>&1) && fail "it was built without room: $said"
    contains "what the build says" "$said" "o space left"
    refused "there is no environment" casemate show more
    casemate destroy --force filler
    (cd ~/more && casemate build more)
    equal "what was built then" "$(casemate exec more -- echo there)" there
    casemate destroy more
    casemate stop demo
}

case_the_processor_is_shared_out() {
    limited
    casemate start limited
    casemate limits limited cpus=0.25
    casemate exec limited -- sh -c 'while :; do :; done' &
    used() { # microseconds of processor in two seconds
        local before after
        before=$(property limited CpuUsage)
        sleep 2
        after=$(property limited CpuUsage)
        echo $((after - before))
    }
    local quarter whole
    quarter=$(used)
    casemate limits limited cpus=max
    whole=$(used)
    echo "of two seconds: $quarter µs at a quarter, $whole µs without a limit"
    [ "$quarter" -gt 0 ] || fail "nothing was counted"
    [ "$quarter" -le 1000000 ] || fail "it used $quarter µs of two seconds at a quarter"
    [ "$whole" -ge $((2 * quarter)) ] || fail "it used $whole µs without a limit, $quarter µs with"
    contains "stats" "$(casemate stats --no-stream limited)" limited
    casemate kill limited
    wait
    casemate limits limited cpus=0.5
}

case_paused_in_its_scope() {
    environment demo '[mounts]' 'workspace = "./:/workspace"'
    casemate start demo
    local group
    group=$(group_of demo)
    casemate pause demo
    contains "events" "$(cat "$group/cgroup.events")" "frozen 1"
    systemctl --user restart casemated
    is demo paused
    refused "is paused" casemate exec demo -- true
    casemate unpause demo
    equal "it answers" "$(casemate exec demo -- echo here)" here
    casemate pause demo
    casemate stop demo
    is demo built
}

# Without a controller what needs it is refused, also where systemd takes the property.
root_what_is_not_delegated_is_refused() {
    printf '[Service]\nDelegate=\nDelegate=memory\n' >/etc/systemd/system/user@.service.d/delegate.conf
    systemctl daemon-reload
    systemctl restart user@1500.service
    within 30 "the user's manager" test -S /run/user/1500/systemd/private
    as_tester bash -euc 'source /job/lib.sh
        cd
        is limited built
        refused "cpu_shares, cpus, io_weight" casemate start limited
        refused "cannot be enforced: systemd'"'"'s user manager has no control over" casemate start limited
        casemate start --unenforced-limits limited 2>~/said
        contains "what was said" "$(cat ~/said)" "limits are not enforced"
        contains "show" "$(casemate show limited)" "cpus = 0.5 (not enforced)"
        casemate stop limited'
    rm /etc/systemd/system/user@.service.d/delegate.conf
    systemctl daemon-reload
    systemctl restart user@1500.service
    within 30 "the user's manager" test -S /run/user/1500/systemd/private
}
