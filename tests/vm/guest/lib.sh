# What cases have at hand. A case is a function whose name begins with
#   case_   run as the user `tester`, in a service of her lingering systemd manager;
#   root_   run as root;
#   boot_   run as root after a reboot, when all others have run.
# Functions run in the order of files and in their order there; the store is one for all. A case fails by any command that
# fails (set -e), so what must fail is asked for with `refused`.
#
# SUITE is bookworm or trixie. There is no network. Each starts in an empty directory of its own.

fail() {
    echo "$*" >&2
    exit 1
}

# equal WHAT FOUND EXPECTED
equal() {
    [ "$2" = "$3" ] || fail "$1: found \"$2\", expected \"$3\""
}

# contains WHAT TEXT PART
contains() {
    case $2 in *"$3"*) ;; *) fail "$1: found \"$2\", which does not contain \"$3\"";; esac
}

# refused TEXT COMMAND…: the command fails by Casemate's hand (125), and says TEXT.
refused() {
    local text=$1 output status=0
    shift
    output=$("$@" 2>&1) || status=$?
    equal "exit status of: $*" $status 125
    contains "what was said by: $*" "$output" "$text"
}

# within SECONDS WHAT COMMAND…: wait until the command succeeds.
within() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "$what: not within the time; last: $("$@" 2>&1 || :)"
        sleep 0.1
    done
}

# as_tester COMMAND…: for root_ and boot_ cases.
as_tester() {
    runuser -u tester -- env HOME=/home/tester XDG_RUNTIME_DIR=/run/user/1500 "$@"
}

# release NAME: import NAME.tar (busybox, or debian: Debian's essential packages), once.
release() {
    casemate release show "local/$1" >/dev/null 2>&1 || casemate release import "$1" "/job/$1.tar"
}

# environment NAME [MANIFEST…]: build it on busybox (or RELEASE), with more lines of manifest, if it is not there yet.
environment() {
    local name=$1 base=${RELEASE:-busybox}
    shift
    if casemate show "$name" >/dev/null 2>&1; then return; fi
    release "$base"
    mkdir -p ~/"$name"
    { printf 'manifest_version = 1\n[base]\nrelease = "local/%s"\n' "$base"; printf '%s\n' "$@"; } >~/"$name/casemate.toml"
    (cd ~/"$name" && casemate build "$name")
}

# state NAME: defined, built, running, …
state() {
    casemate show "$1" | sed -n 's/^state *//p'
}

is() { # NAME STATE
    [ "$(state "$1")" = "$2" ]
}

# of UNIT PROPERTY: of one of the user's units.
of() {
    systemctl --user show --value --property="$2" "$1"
}

daemon() {
    of casemated.service MainPID
}

# init_of ID: the pid of an environment's init, from what the daemon wrote down. No daemon is started to tell.
init_of() {
    sed -n 's/^pid = //p' "/run/user/1500/casemate/$1/state.toml"
}

id_of() { # NAME
    casemate show --json "$1" | sed -n 's/^ *"id": "\([^"]*\)".*/\1/p'
}

gone() { # PID
    [ ! -e "/proc/$1" ]
}

# drop_in NAME LINE…: change casemated.service for this case alone: call `drop_in_end` when it ends.
drop_in() {
    local directory=$XDG_RUNTIME_DIR/systemd/user.control/casemated.service.d
    mkdir -p "$directory"
    { echo '[Service]'; printf '%s\n' "$@"; } >"$directory/case.conf"
    trap drop_in_end EXIT
    systemctl --user daemon-reload
    systemctl --user restart casemated
}

drop_in_end() {
    rm -rf "$XDG_RUNTIME_DIR/systemd/user.control/casemated.service.d"
    systemctl --user daemon-reload
    systemctl --user restart casemated
}
