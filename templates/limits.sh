#!/bin/sh
# limits.sh [NAME=VALUE …]: moves what ends this box by itself, and tells what holds, one NAME=VALUE a line.
# NAME: LEASE_S, IDLE_S or MAX_S (seconds), MAX_DOLLARS; DPH ($/h that dollars are counted with) is moved, and not told.
# The last line, WATCH=…, is what the watchdog measured last.
#
# Nothing else writes run/limits. It is reached over ssh alone (`selfhost extend`): nothing that talks to the proxy can
# give a box more time. The watchdog reads it at every look, after what the create call said.

umask 077
cd "$HOME/.selfhost/run" || exit 1

FORM='(LEASE_S|IDLE_S|MAX_S|MAX_DOLLARS|DPH)=[0-9]{1,9}(\.[0-9]{1,6})?'

main() {
  exec 9>limits.lock
  flock -w 5 9 || refuse 1 "somebody else is moving the limits"
  [ $# = 0 ] || move "$@"
  tell
}

move() {
  # The watchdog does not take a verdict back.
  [ ! -s verdict ] || refuse 1 "the box is ending already: $(cat verdict)"
  for pair; do
    case $pair in *[!A-Z_0-9=.]*) refuse 2 "no limit: $pair" ;; esac
    echo "$pair" | grep -qxE "$FORM" || refuse 2 "no limit: $pair"
  done
  # All of them or none. The watchdog goes by the last line of a name.
  {
    grep -sxE "SELFHOST_$FORM" limits
    printf 'SELFHOST_%s\n' "$@"
  } >limits.new || refuse 1 "run/limits cannot be written"
  mv limits.new limits || exit 1
}

tell() (
  unset SELFHOST_LEASE_S SELFHOST_IDLE_S SELFHOST_MAX_S SELFHOST_MAX_DOLLARS
  # shellcheck source=/dev/null
  [ ! -e box.env ] || . ./box.env
  eval "$(grep -sxE "SELFHOST_$FORM" limits)"
  echo "LEASE_S=${SELFHOST_LEASE_S:-2700}"
  echo "IDLE_S=${SELFHOST_IDLE_S:-2700}"
  echo "MAX_S=${SELFHOST_MAX_S:-28800}"
  echo "MAX_DOLLARS=${SELFHOST_MAX_DOLLARS:-5}"
  echo "WATCH=$(cat watch 2>/dev/null)"
)

refuse() {
  echo "limits.sh: $2" >&2
  exit "$1"
}

main "$@"
