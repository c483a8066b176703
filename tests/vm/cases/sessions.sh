# Commands and terminals in an environment, under systemd and on this kernel.

case_exit_statuses() {
    environment demo
    local status expected command
    while read -r expected command; do
        status=0
        casemate exec demo -- sh -c "$command" </dev/null || status=$?
        equal "status of $command" $status "$expected"
    done <<'END'
0 true
3 exit 3
127 no-such-command
143 kill -TERM $$
END
    status=0
    casemate exec demo -- /no/such || status=$?
    equal "status of what is not there" $status 127
    status=0
    casemate exec demo -- /etc/passwd || status=$?
    equal "status of what can't be executed" $status 126
}

case_a_terminal_of_its_own() {
    environment demo
    local output status=0
    # `script` gives the client a terminal.
    output=$(script --quiet --return --command "stty rows 31 cols 99; casemate enter demo -- sh -c 'tty; stty size; exit 5'" \
        /dev/null </dev/null) || status=$?
    contains "what is seen of the terminal" "$output" /dev/pts/
    contains "its size" "$output" "31 99"
    equal "status" $status 5
}

case_root_inside_is_nobody_outside() {
    environment demo
    equal "root inside" "$(casemate exec --root demo -- id -u)" 0
    equal "the user inside" "$(casemate exec demo -- id -u)" 1500
    casemate start demo
    mkfifo ready go
    casemate exec --root demo -- sh -c 'echo; read -r _' <go >ready &
    exec 8>go
    read -r _ <ready
    local pid uid
    pid=$(pgrep --newest --full '^sh -c echo; read -r _')
    uid=$(stat --format %u "/proc/$pid")
    [ "$uid" -ge 100000 ] || fail "root inside is $uid outside"
    exec 8>&-
    wait
    casemate stop demo
}
