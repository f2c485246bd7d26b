# Runs the tests that /lab/tests lists, two at a time as there are two processors: a line each of suite, program, name
# and seconds. Each is a process of its own, and ends with everything that it started.
if [ $# = 0 ]; then
    exec xargs --arg-file=/lab/tests --delimiter='\n' --max-procs=2 --max-args=1 sh "$0"
fi
IFS='	' read -r suite program name limit <<END
$1
END
mkdir -p "/out/$suite"
log=/out/$suite/$(echo "$name" | tr -c 'a-z0-9_\n' -).log
start=$(date +%s%3N)
timeout --kill-after=10 "$limit" "$program" --exact "$name" --nocapture </dev/null >"$log" 2>&1
code=$?
took=$(($(date +%s%3N) - start))
why=$(grep -ao -m1 'skipped: .*' "$log")
exec 9>/run/talk
flock 9
printf 'lab:test\t%s\t%s\t%s\t%s\t%s\n' "$suite" "$name" "$code" "$took" "$why"
[ "$code" = 0 ] || tail -n 100 "$log" | sed 's/^/    | /'
# Not xargs' affair: it would stop at some codes.
exit 0
