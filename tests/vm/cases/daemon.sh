# The daemon's unit under the user's systemd manager.

case_the_bus_starts_the_unit() {
    systemctl --user stop casemated
    equal "state before" "$(of casemated ActiveState)" inactive
    casemate list
    equal "state after" "$(of casemated ActiveState)" active
    equal "owner of the name" "$(busctl --user status org.casemate.Casemate1 | sed -n 's/^PID=//p')" "$(daemon)"
    contains "cgroup of the daemon" "$(cat "/proc/$(daemon)/cgroup")" /user@1500.service/app.slice/casemated.service
}

# Whoever waits in systemd for its start gets on as soon as it serves.
case_the_unit_is_started_when_it_serves() {
    systemctl --user stop casemated
    systemctl --user start casemated
    busctl --user --auto-start=no call org.casemate.Casemate1 /org/casemate/Casemate1 org.freedesktop.DBus.Peer Ping
}

case_the_watchdog_is_fed_and_bites() {
    environment demo
    casemate start demo
    drop_in WatchdogSec=6 Restart=no
    local fed
    fed=$(of casemated WatchdogTimestampMonotonic)
    fed_again() { [ "$(of casemated WatchdogTimestampMonotonic)" != "$fed" ]; }
    within 30 "the watchdog is fed" fed_again
    kill -STOP "$(daemon)"
    bitten() { [ "$(of casemated Result)" = watchdog ]; }
    within 60 "the watchdog ends what hangs" bitten
    is demo running || fail "the environment went with the daemon"
    equal "a new one serves" "$(casemate exec demo -- echo again)" again
    casemate stop demo
}

# Each environment is in a scope of its own; nothing of it is in the unit.
case_stop_and_restart_leave_environments_alone() {
    environment demo
    casemate start demo
    local id init
    id=$(id_of demo) init=$(init_of "$id")
    systemctl --user stop casemated
    equal "the unit" "$(of casemated ActiveState)" inactive
    ! gone "$init" || fail "init $init ended with the daemon's unit"
    is demo running
    equal "init after the stop" "$(init_of "$id")" "$init"
    local before
    before=$(daemon)
    systemctl --user restart casemated
    [ "$(daemon)" != "$before" ] || fail "it was not restarted"
    is demo running
    equal "init after the restart" "$(init_of "$id")" "$init"
    equal "it answers" "$(casemate exec demo -- echo here)" here
    casemate stop demo
    gone "$init" || fail "init $init outlived casemate stop"
}

case_killed_it_finds_what_runs() {
    environment demo
    casemate start demo
    local id init status=0
    id=$(id_of demo) init=$(init_of "$id")
    mkfifo ready go
    casemate exec demo -- sh -c 'echo; read -r _; exit 7' <go >ready &
    exec 8>go
    read -r _ <ready
    kill -KILL "$(daemon)"
    dead() { [ "$(of casemated ActiveState)" = failed ]; }
    within 20 "systemd sees the end" dead
    is demo running
    equal "init" "$(init_of "$id")" "$init"
    echo >&8
    wait $! || status=$?
    equal "a session's status, across the daemon's death" $status 7
    casemate stop demo
}

case_idle_it_ends_and_is_started_anew() {
    environment demo
    drop_in ExecStart= "ExecStart=/usr/local/libexec/casemate/casemated --idle-exit 2"
    casemate start demo
    local first
    first=$(daemon)
    casemate stop demo
    ended() { [ "$(of casemated ActiveState)" = inactive ]; }
    within 60 "the idle daemon ends" ended
    equal "how it ended" "$(of casemated Result)" success
    is demo built
    [ "$(daemon)" != "$first" ] || fail "it is the same daemon"
}

case_its_log_level_is_systemctls() {
    casemate list >/dev/null
    equal "level" "$(systemctl --user service-log-level casemated)" info
    systemctl --user service-log-level casemated debug
    equal "level, set" "$(systemctl --user service-log-level casemated)" debug
    systemctl --user service-log-level casemated info
    equal "target" "$(systemctl --user service-log-target casemated)" console
}
