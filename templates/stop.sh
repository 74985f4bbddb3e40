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

end() {
  tries=0
  while running "$1"; do
    tries=$((tries + 1))
    [ "$tries" -le 80 ] || return 1
    if pid=$(loop "$1"); then
      kill "$pid" 2>/dev/null
      # The loop leads its process group: this ends the part as well, however deaf it is.
      [ "$tries" -le 50 ] || kill -KILL "-$pid" 2>/dev/null
    fi
    sleep 0.1
  done
}

# The pid of the part's loop. The number in the file may be anybody's by now, so it has to look like one.
loop() {
  pid=$(cat "run/$1.pid" 2>/dev/null) || return
  case $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") in
    *"start.sh supervise $1 "*) echo "$pid" ;;
    *) return 1 ;;
  esac
}

running() {
  [ -e "run/$1.lock" ] && ! flock -ns "run/$1.lock" true
}

main "$@"
