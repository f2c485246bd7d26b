# Runs this machine's share of the tests that /lab/tests lists, one after the other: a line each of suite, program, name and
# seconds. Each is a process of its own, and ends with everything that it started. One that fails has a second try, as the
# emulated SVM loses an interrupt now and then; what the first one said is shown.
value() { sed -n "s/.*lab\.$1=\([0-9]*\).*/\1/p" /proc/cmdline; }
try() {
    timeout --kill-after=10 "$limit" "$program" --exact "$name" --nocapture </dev/null >"$log" 2>&1
    code=$?
    [ "$code" = 0 ] || tail -n 60 "$log" | sed 's/^/    | /'
}
awk -v part="$(value part)" -v parts="$(value parts)" -v done="$(value done)" \
    'NR % parts == part && ++n > done' /lab/tests >/tmp/share
while IFS='	' read -r suite program name limit; do
    mkdir -p "/out/$suite"
    log=/out/$suite/$(echo "$name" | tr -c 'a-z0-9_\n' -).log
    start=$(date +%s%3N)
    try
    [ "$code" = 0 ] || { printf 'lab:again\t%s %s\n' "$suite" "$name" && try; }
    took=$(($(date +%s%3N) - start))
    why=$(grep -ao -m1 'skipped: .*' "$log")
    printf 'lab:test\t%s\t%s\t%s\t%s\t%s\n' "$suite" "$name" "$code" "$took" "$why"
done </tmp/share
exit 0
