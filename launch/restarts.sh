# Sourced by launch/slurm.sbatch and launch/local.sh: whether a run that failed may start again.
#
# Needs: run (folder of the run), folder (of this submission), restarts (how many are allowed).
# Counted are failures in a row without a new checkpoint between them: a run that gets on may fail as often as it likes,
# one that fails at the same place ends. The count is a file, so it outlives a requeue.
#   $folder/begun      there while an attempt runs; found at a start, the last one ended without a word
#   $folder/failures   how many, and the checkpoint that was the newest then

say() { echo "$(date '+%F %T') launch: $*"; }

# Names of the newest checkpoints, of a run or of the stages of a curriculum.
newest() { cat "$run"/checkpoints/latest "$run"/*/checkpoints/latest 2>/dev/null | tr '\n' ' '; }

# failed WHY: count a failure; false where no restart is left.
failed() {
    local count=0 before='' now
    rm -f "$folder/begun"
    now=$(newest)
    [ -f "$folder/failures" ] && { read -r count; IFS= read -r before; } <"$folder/failures"
    if [ "$now" != "$before" ]; then
        [ "$count" -gt 0 ] && say "the run has saved ${now% } since its last failure: counting anew"
        count=0
    fi
    count=$((count + 1))
    printf '%s\n%s\n' "$count" "$now" >"$folder/failures"
    if [ "$count" -gt "$restarts" ]; then
        say "error: $1; it has failed $count times without a new checkpoint, restarts=$restarts: not started again"
        return 1
    fi
    say "$1; restart $count of $restarts from ${now:-the beginning}"
}

# begin: note that an attempt runs; false where the last one ended without a word and no restart is left.
begin() {
    if [ -e "$folder/begun" ]; then
        failed "the last attempt ended without a word (a node that failed, or kill -9)" || return 1
    fi
    : >"$folder/begun"
}
