#!/bin/sh
# Runs at every start of the container, before anybody can log in; the keys stand in front of this text
# (HOST_KEY, HOST_PUB, LOGIN_KEY, WATCHDOG: see payload.onstart). The whole has to stay below 4000 bytes.
# Every line may run again at the next start; only the bootstrap host key may not.

umask 077
export HOME="${HOME:-/root}"
mkdir -p ~/.ssh ~/.selfhost
cd ~/.selfhost || exit
mkdir -p run log bin downloads steps
# Nothing that is started below may keep the caller's stdout open.
exec </dev/null >>log/onstart.log 2>&1

# First what the watchdog needs: only this process has the market's variables, and nothing may read /proc/1 later.
# awk, because a value may hold newlines and quotes. Run by hand later, without those variables, it keeps the old file.
[ "$CONTAINER_ID" ] || [ ! -e run/box.env ] && awk 'BEGIN {
  q = "\047"
  for (k in ENVIRON) if (k ~ /^(CONTAINER_ID|CONTAINER_API_KEY|SELFHOST_[A-Z_0-9]+)$/) {
    v = ENVIRON[k]
    gsub(q, q "\\\\" q q, v)
    print k "=" q v q
  }
}' >run/box.new && mv run/box.new run/box.env
# shellcheck source=/dev/null
. run/box.env

# Replaced, not overwritten: a shell that runs it reads it bit by bit. A second watchdog sees the first one's lock and leaves.
echo "$WATCHDOG" | base64 -d | gzip -d >bin/new && mv bin/new bin/watchdog.sh
sh bin/watchdog.sh >>log/watchdog.log 2>&1 &

# The sshd that the market started may be up already, with a key that the image brought, or be just about to write
# its pid file: so ask it again for a while. In a sandbox only the box's own sshd may be touched.
R=$SELFHOST_ROOT
if [ ! -e run/hostkey ]; then
  mkdir -p "$R/etc/ssh"
  K=$R/etc/ssh/ssh_host_ed25519_key
  echo "$HOST_PUB" >"$K.pub"
  chmod 644 "$K.pub"
  echo "$HOST_KEY" >"$K.new" && mv "$K.new" "$K" && : >run/hostkey
  for i in 1 2 3 4 5 6 7 8 9; do
    # shellcheck disable=SC2046
    kill -HUP $(cat "$R/run/sshd.pid" || [ "$R" ] || grep -ls '^sshd: .*\[listener' /proc/[0-9]?*/cmdline | cut -d/ -f3) 2>&- && break
    sleep $i
  done &
fi

# The market also puts the key there, but with a wrong owner at times, or not at all.
A=$HOME/.ssh/authorized_keys
grep -qsxF "$LOGIN_KEY" "$A" || printf '\n%s\n' "$LOGIN_KEY" >>"$A"
chmod 700 ~/.ssh
chmod 600 "$A"
chown 0:0 ~/.ssh "$A"
: >~/.no_auto_tmux

# A head start for the model or the engine; install.sh waits for the lock on the .part file, goes on where this ended,
# and verifies. Below 1 MB/s for 20 s, another connection is tried. An image that brings Ollama likely needs none.
U=$SELFHOST_FETCH_URL
F=${U##*/}
F=downloads/${F%%\?*}
case $F in */ollama-*) command -v ollama && U= ;; esac
# shellcheck disable=SC2016
[ "$U" ] && [ ! -e "$F" ] && command -v curl && setsid flock -n "$F.part" sh -c '
  for i in 1 2 3 4 5; do
    curl -qfsSLC - --connect-timeout 20 -y 20 -Y 999999 -o "$0" "$1" && break
    sleep 5
  done' "$F.part" "$U" &

# After a restart of the container the installed parts come back.
[ -e steps/start ] && sh bin/start.sh &
