# casemate-environment@.service: an environment started at boot for a lingering user, and stopped in order.

case_the_unit_starts_and_stops() {
    environment served
    systemctl --user start casemate-environment@served
    is served running
    systemctl --user restart casemated
    is served running
    equal "unit, after the daemon's restart" "$(of casemate-environment@served ActiveState)" active
    local init
    init=$(init_of "$(id_of served)")
    systemctl --user stop casemate-environment@served
    gone "$init" || fail "init $init outlived its unit"
    is served built
}

case_the_unit_of_an_unknown_environment_fails() {
    ! systemctl --user start casemate-environment@nobody || fail "it started"
    contains "the journal" "$(journalctl --user --unit=casemate-environment@nobody --no-pager)" 'no environment'
    systemctl --user reset-failed casemate-environment@nobody
}

# What nobody made a unit for ends with the user's manager, and leaves nothing that confuses the next one.
root_environments_end_with_the_manager() {
    as_tester bash -euc 'source /job/lib.sh; environment demo; casemate start demo'
    local id init
    id=$(as_tester bash -c 'source /job/lib.sh; id_of demo')
    init=$(init_of "$id")
    journalctl --cursor-file=/tmp/cursor --lines=0
    systemctl stop user@1500.service
    gone "$init" || fail "init $init outlived the user's manager"
    # The daemon ends before its bus does.
    ! journalctl --cursor-file=/tmp/cursor --no-pager _UID=1500 | grep -F 'casemated.service: Failed' || fail "the daemon did not end in order"
    systemctl start user@1500.service
    as_tester bash -euc 'source /job/lib.sh; is demo built; equal "it runs" "$(casemate exec demo -- echo fine)" fine'
}

# The session's client is spared by systemd, so the signal that the session writes down comes from `casemate stop` alone.
case_the_unit_is_enabled() {
    environment served '[mounts]' 'workspace = "./:/workspace"'
    casemate destroy served
    environment served '[mounts]' 'workspace = "./:/workspace"'
    systemctl --user enable --now casemate-environment@served
    systemd-run --user --unit=session --property=KillSignal=SIGCONT --property=SendSIGKILL=no \
        casemate exec served -- sh -c 'trap "echo ended >/workspace/ended; exit" TERM HUP; touch /workspace/began; while :; do sleep 0.1; done'
    within 30 "the session" test -e ~/served/began
    [ ! -e ~/served/ended ]
}

boot_it_was_stopped_in_order() {
    equal "what the session wrote" "$(cat /home/tester/served/ended)" ended
    journalctl --boot=-1 --no-pager --output=short-monotonic _UID=1500 >/tmp/before
    local order
    order=$(grep -oE 'Stopped casemate-environment@served|Stopping casemated.service' /tmp/before | tail -2 | tr '\n' ';')
    equal "order in the journal" "$order" "Stopped casemate-environment@served;Stopping casemated.service;"
}

boot_it_was_started_for_the_lingering_user() {
    equal "sessions of people" "$(loginctl list-sessions --no-legend)" ""
    active() { as_tester systemctl --user is-active casemate-environment@served; }
    within 60 "the unit" active
    local state
    state=$(echo /run/user/1500/casemate/*/state.toml)
    [ -e "/proc/$(sed -n 's/^pid = //p' "$state")/cgroup" ] || fail "no init runs"
    equal "a command" "$(as_tester casemate exec served -- echo up)" up
}
