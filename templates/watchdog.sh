#!/bin/sh
# Ends this box when nobody needs it any more: lease not renewed, idle too long, or a cap in hours or dollars reached.
# It needs neither the laptop nor the account key, only the key that the market gives to the box itself.
# It travels inside onstart.sh (gzip + base64), so every byte counts: comments and indentation are stripped on the way.
# All state is files in ~/.selfhost/run, so that people and tests can see and move it.

# Run from ~/.selfhost by whoever may find it dead: onstart, start.sh's loops, each renewal of the lease. All of them
# only make a loop in a session of its own, which starts it again when it is killed.
# shellcheck disable=SC2016
[ "$1" ] || exec setsid sh -c 'until sh "$0" -; do sleep 5; done' "$0"

cd run || exit

# A lock instead of a look at the pid file: pids are used again after a container restart, locks are not.
# Status 1 means that another one holds it, and 0 ends our loop; anything else (no flock on this image) must not cost us
# the watchdog.
exec 9>watchdog.lock
flock -n 9 || [ $? != 1 ] || exit 0

trap '' 1 2 15

# Exported, because awk reads the limits from its environment. The C locale keeps awk's decimal point a point.
set -a
# shellcheck source=/dev/null
. ./box.env
LC_ALL=C

echo $$ >watchdog.pid
[ -e lease ] || : >lease
# Never moved by restarts. Should it be unreadable, it counts as 1970, which ends the box: the safe side.
[ -s started ] || date +%s >started
t0=$(cat started)
# Both outlive us. Once said, a verdict stands: a box that is being destroyed must not be taken up again.
v=$(cat verdict 2>&-)
b=$(cat watch 2>&-)

# api METHOD BODY: one call about this instance, prints the HTTP status (000: no answer, nothing: no curl).
# The key goes through stdin, because arguments can be read in ps. No proxy: none may see the key or stop the end.
# The lock is closed for everything that can outlive us.
api() {
  printf 'header="Authorization: Bearer %s"' "$CONTAINER_API_KEY" |
    curl -qsSK - --noproxy '*' -m 20 -o /dev/null -w '%{http_code}' -X "$1" -H 'Content-Type: application/json' -d "$2" \
      "${SELFHOST_MARKET_URL:-https://console.vast.ai}/api/v0/instances/$CONTAINER_ID/" 9>&-
}

# Prints what is measured: BYTES up-for not-renewed-for idle-for (seconds) dollars, and, if so, why the box has to end.
# BYTES is received/sent in all, and what the kernel counted of them at the last look: it begins again at 0 whenever the
# container starts. Runs in a subshell, so that what `limits` says lasts for one look only.
# Idleness counts from the first time the proxy was ready. An unreadable traffic table costs the bytes, not the verdict.
look() {
  l=$(stat -c %Y lease)
  a=
  [ -e ready ] && a=$(stat -c %Y ready activity | sort -n | tail -n 1)
  eval "$(grep -xE 'SELFHOST_(LEASE_S|IDLE_S|MAX_S|MAX_DOLLARS|DPH)=[0-9]+(\.[0-9]+)?' limits)"
  # shellcheck disable=SC2002
  cat "${SELFHOST_NET_DEV:-/proc/net/dev}" | awk -v n="$(date +%s)" -v s="$t0" -v l="${l:-$t0}" -v a="$a" -v b="$b" '
    function g(k, d) { k = ENVIRON["SELFHOST_" k]; return k == "" ? d : k + 0 }
    sub(/:/, " ") && $1 != "lo" { r += $2; t += $10; m = 1 }
    END {
      split(b, p, "[/ ]")
      if (m) {
        p[1] += r < p[3] ? r : r - p[3]
        p[2] += t < p[4] ? t : t - p[4]
        p[3] = r
        p[4] = t
      }
      h = n - s
      d = h / 3600 * g("DPH") + (p[1] * g("DOWN_PER_GB") + p[2] * g("UP_PER_GB")) / 1e9
      l = n - l
      i = a ? n - a : 0
      printf "%.0f/%.0f/%.0f/%.0f %d %d %d %.4f ", p[1], p[2], p[3], p[4], h, l, i, d
      if (l > g("LEASE_S", 2700)) print "lease not renewed for " l " s"
      else if (i > g("IDLE_S", 2700)) print "idle for " i " s"
      else if (h > g("MAX_S", 28800)) print "time cap: " h " s"
      else if (d > g("MAX_DOLLARS", 5)) print "money cap: $" d
    }'
} 2>/dev/null

# Clocks are set, right after a start above all, and no box is to live longer or shorter for it. The time since the
# kernel's start tells: when the clock has jumped against it, the start moves along, and lease and idleness begin anew.
k=
clock() {
  u=$(cut -d. -f1 "${SELFHOST_UPTIME:-/proc/uptime}") && c=$(($(date +%s) - u)) || return
  d=$((c - ${k:-$c}))
  k=$c
  [ ${d#-} -lt 60 ] && return
  t0=$((t0 + d))
  echo $t0 >started
  touch -c lease ready activity
}

n=0
while :; do
  clock
  # Asking for the state that it has changes nothing, and proves that the key and the way to the market work.
  if [ ! -s armed ]; then
    c=$(api PUT '{"state":"running"}')
    case $c in
      2*) echo ok >armed ;;
      000 | 3* | 408 | 429 | 5*) ;;
      *) echo "refused ${c:-no curl}" >armed ;;
    esac
  fi
  # Kept in memory as well: a full disk may cost the file, never the count or the verdict.
  o=$(look)
  [ "$o" ] && b=$o && echo "$o" >watch.new && mv watch.new watch
  v=${v:-${o#* * * * * }}
  if [ "$v" ]; then
    echo "$v" >verdict
    n=$((n + 1))
    echo "$v: $(date) $(api DELETE '{}')"
    # Still being here is the failure, whatever the answers said: stopping is cheaper than running.
    [ $n -ge 5 ] && api PUT '{"state":"stopped"}'
    [ $n = 10 ] && sh ../bin/stop.sh engine 9>&- &
  fi
  sleep "${SELFHOST_TICK_S:-5}" 9>&-
done
