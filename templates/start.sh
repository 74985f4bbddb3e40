#!/bin/sh
# start.sh [engine|proxy]: starts the parts under supervision; what runs already is left alone.
#
# Each part has a small loop of its own (pid in run/PART.pid) that starts it again when it dies: after 1 s, then 2, 4, …
# up to 30 s while it keeps dying. The loop leads a process group of its own, so that stop.sh can end all of it.

umask 077
cd "$HOME/.selfhost" || exit 1

# A part needs neither the market's key nor whatever Python settings the caller had.
unset CONTAINER_API_KEY PYTHONPATH PYTHONHOME PYTHONPYCACHEPREFIX
# Packages were compiled by pip; nothing may be written beside the system's own modules.
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

main() {
  case ${1-} in
    supervise) supervise "$2" ;;
    engine | proxy) launch "$1" ;;
    '') launch engine && launch proxy ;;
    *)
      echo "usage: start.sh [engine|proxy]" >&2
      exit 2
      ;;
  esac
}

# The loop must not hold anything of its caller: an ssh session would never end, a lock never be free.
launch() {
  [ -d "$1/venv" ] || {
    echo "start.sh: the $1 is not installed: run install.sh first" >&2
    return 1
  }
  flock -ns "run/$1.lock" true 2>/dev/null || return 0
  setsid nohup sh "$HOME/.selfhost/bin/start.sh" supervise "$1" \
    </dev/null >>"log/$1.log" 2>&1 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- &
}

supervise() {
  part=$1
  # Two starts at once: the lock decides, and as long as it is held the pid file is true.
  exec 9>"run/$part.lock"
  # Waiting a little, because whoever only looks (start.sh, stop.sh) holds it for a moment too.
  flock -w 3 9 || exit 0
  echo $$ >"run/$part.pid"
  echo 0 >"run/$part.deaths"
  child='' delay=1 deaths=0
  trap '' HUP
  trap 'finish' TERM INT
  bury
  # exec in a subshell: a redirection of the function itself would only put the lock aside, on another descriptor.
  (exec 9>&- && look_after) &
  while :; do
    began=$(date +%s)
    (exec 9>&- && "run_$part") &
    child=$!
    echo "$child" >"run/$part.child"
    wait "$child"
    code=$?
    [ $(($(date +%s) - began)) -gt 60 ] && delay=1 deaths=0
    deaths=$((deaths + 1))
    echo "$deaths" >"run/$part.deaths"
    echo "$(date '+%F %T') start.sh: $part ended with status $code, again in $delay s"
    # In the background, because a shell does not hear signals before a foreground child has ended.
    sleep "$delay" 9>&- &
    wait $!
    delay=$((delay * 2 > 30 ? 30 : delay * 2))
  done
}

# The loop was told to end: the part first, politely; stop.sh kills what does not listen.
finish() {
  trap '' TERM INT
  [ -n "$child" ] && kill "$child" 2>/dev/null && wait "$child"
  rm -f "run/$part.pid" "run/$part.child"
  kill -KILL -$$
}

# A loop that was killed leaves its part behind, which would keep the port and the memory.
bury() {
  old=$(cat "run/$part.child" 2>/dev/null) || return 0
  case $(tr '\0' ' ' 2>/dev/null <"/proc/$old/cmdline") in
    # What ollama.py leaves behind, the next ollama.py buries.
    *llamacpp.py* | *ollama.py* | *selfhost_cli.proxy*) kill -KILL "$old" ;;
  esac
}

# Every minute: a watchdog, should it be dead (where one lives, this one leaves), and a small log. That is cut in place:
# the part goes on writing to the same file, at its end.
look_after() {
  log=log/$part.log
  while kill -0 $$ 2>/dev/null; do
    [ ! -e bin/watchdog.sh ] || sh bin/watchdog.sh >>log/watchdog.log 2>&1 &
    if [ "$(stat -c %s "$log")" -gt 5000000 ]; then
      tail -c 1000000 "$log" >"$log.cut" && cat "$log.cut" >"$log"
      rm -f "$log.cut"
    fi
    sleep 60
  done
}


run_engine() {
  settings
  # The engine needs no token.
  unset SELFHOST_TOKEN
  case $SELFHOST_ENGINE in
    llamacpp)
      file=${SELFHOST_MODEL_URL##*/}
      exec engine/venv/bin/python bin/llamacpp.py --model "downloads/${file%%\?*}" --alias "$SELFHOST_MODEL" \
        --context "$SELFHOST_CONTEXT" --slots "${SELFHOST_SLOTS:-1}" --kv-cache-type "${SELFHOST_KV_CACHE_TYPE:-f16}" \
        --port-file run/engine.port
      ;;
    ollama)
      exec engine/venv/bin/python bin/ollama.py serve --model "$SELFHOST_MODEL" --context "$SELFHOST_CONTEXT" \
        --slots "${SELFHOST_SLOTS:-1}" --kv-cache-type "${SELFHOST_KV_CACHE_TYPE:-q8_0}"
      ;;
    *)
      echo "start.sh: no engine '$SELFHOST_ENGINE' in this version"
      exit 1
      ;;
  esac
}


run_proxy() {
  settings
  PYTHONPATH=bin/proxy.zip exec proxy/venv/bin/python -m selfhost_cli.proxy --run-dir "$HOME/.selfhost/run"
}

settings() {
  set -a
  # shellcheck source=/dev/null
  . run/install.env
  set +a
}

main "$@"
