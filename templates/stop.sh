#!/bin/sh
# stop.sh [engine|proxy]: ends the parts and the loops that would start them again. Never the watchdog.

cd "$HOME/.selfhost" || exit 1

main() {
  case ${1-} in
    engine | proxy) end "$1" ;;
    '') end proxy && end engine ;;
    *)
      echo "usage: stop.sh [engine|proxy]" >&2
      exit 2
      ;;
  esac
}

# The pid file is true only while the loop holds its lock: without it, the number may be anybody's by now.
end() {
  running "$1" || return 0
  pid=$(cat "run/$1.pid")
  kill "$pid" 2>/dev/null
  tries=0
  while running "$1"; do
    tries=$((tries + 1))
    # The loop leads its process group: this ends the part as well, however deaf it is.
    [ "$tries" -gt 50 ] && kill -KILL "-$pid" 2>/dev/null
    [ "$tries" -gt 80 ] && break
    sleep 0.1
  done
  ! running "$1"
}

running() {
  [ -e "run/$1.lock" ] && ! flock -ns "run/$1.lock" true
}

main "$@"
