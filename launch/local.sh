#!/usr/bin/env bash
# One node without SLURM: torchrun with a process for each GPU, a log, restarts, and signals that reach the run.
#
#   launch/local.sh [processes=N] [restarts=3] [log=FILE] recipe=stage2 [KEY=VALUE ...]
#
# Ctrl-C, SIGTERM and SIGUSR1 let the run finish its step and save; a second one ends it at once. A run that fails is
# started again, up to `restarts` times without a new checkpoint between; a mistake in settings or data is not.
# Status: 0 done or stopped as asked, 2 a mistake, 1 no restart left, 130 ended at once. PYTHON names another python.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
processes='' restarts=3 log='' settings=()
for word in "$@"; do
    case $word in
    processes=*) processes=${word#*=} ;;
    restarts=*) restarts=${word#*=} ;;
    log=*) log=${word#*=} ;;
    *) settings+=("$word") ;;
    esac
done
for value in "${processes:-1}" "$restarts"; do
    [[ $value =~ ^[0-9]{1,6}$ ]] && continue
    echo "error: processes and restarts are whole numbers, not '$value'" >&2
    exit 2
done

answer=$("$python" -m launch.checked ${settings[@]+"${settings[@]}"}) || exit
{ IFS= read -r run; IFS= read -r devices; } <<<"$answer"
processes=${processes:-$devices}
folder=$run/local
mkdir -p "$folder" || exit
log=${log:-$folder/log.txt}
exec > >(exec tee -ia "$log") 2>&1
. "$root/launch/restarts.sh"
export OMNILOOM_OUTCOME="$folder/outcome"
rm -f "$folder/begun" "$folder/failures"

asked='' torchrun=''
stop() {
    if [ -n "$asked" ] || ! pkill -USR1 -P "$torchrun"; then # again, or no rank is there yet
        [ -n "$torchrun" ] && { pkill -KILL -P "$torchrun"; kill -KILL "$torchrun"; }
        say "ended at once; the last checkpoint is whole"
        exit 130
    fi
    asked=1
    say "asking the run to save and stop; once more to end it at once"
}
trap stop INT TERM USR1

say "$processes processes, log in $log"
while :; do
    rm -f "$OMNILOOM_OUTCOME"
    "$python" -m launch.torchrun --standalone --nproc-per-node="$processes" --max-restarts=0 \
        -m launch.rank "${settings[@]}" &
    torchrun=$!
    while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done # a signal ends a wait, not torchrun
    wait "$torchrun"
    status=$?
    case "$(cat "$OMNILOOM_OUTCOME" 2>/dev/null)" in
    done | stopped) exit 0 ;;
    error) exit 2 ;;
    esac
    [ -n "$asked" ] && exit 1
    failed "the run failed (torchrun: status $status)" || exit 1
done
