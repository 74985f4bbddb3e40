#!/bin/sh
# hostkey.sh make OLD: prints the public half of the host key that is to follow OLD, and makes that key first if need be.
# hostkey.sh switch NEW: sshd shows it from now on. OLD and NEW are public keys without a comment.
#
# Either may be killed anywhere and run again: a key appears whole, and what sshd reads changes in one rename. Between the
# two our laptop notes NEW: it could not know the box again otherwise.

umask 077
cd "$HOME/.selfhost" || exit 1
R=$SELFHOST_ROOT # of a sandbox: only the box's own sshd may be touched there
K=$R/etc/ssh/ssh_host_ed25519_key

main() {
  exec 9>run/hostkey.lock
  flock -w 5 9 || refuse "somebody else is replacing the host key"
  case $1 in
    make) make "$2" ;;
    switch) switch "$2" ;;
    *) refuse "no such verb: $1" ;;
  esac
}

make() {
  new=$(public "$K")
  if [ "$new" = "$1" ]; then
    [ -e "$K.next" ] || generate
    new=$(public "$K.next")
  fi
  [ "$new" ] || refuse "there is no host key, or a damaged one"
  echo "$new"
}

generate() {
  rm -f "$K.draft" "$K.draft.pub"
  ssh-keygen -q -t ed25519 -N '' -C selfhost -f "$K.draft" </dev/null || refuse "no host key can be made"
  rm -f "$K.draft.pub"
  mv "$K.draft" "$K.next" || refuse "the new host key cannot be put beside the old one"
}

switch() {
  if [ "$(public "$K")" != "$1" ]; then
    [ "$(public "$K.next")" = "$1" ] || refuse "the key that is to follow is another one"
    mv "$K.next" "$K" || refuse "the host key cannot be replaced"
  fi
  : >run/hostkey
  echo "$1 selfhost" >"$K.pub.new" && chmod 644 "$K.pub.new" && mv "$K.pub.new" "$K.pub"
  forget
  tell
}

public() {
  ssh-keygen -y -f "$1" </dev/null | cut -d' ' -f1,2
}

# The market keeps what it ran at the start here; run/hostkey tells it not to install a key again.
forget() {
  O=$HOME/onstart.sh
  grep -qs "^HOST_KEY='" "$O" || return 0
  cp -p "$O" "$O.new" && awk '
    /^HOST_KEY=\047/ { print "HOST_KEY="; old = 1 }
    !old
    /\047$/ { old = 0 }
  ' "$O" >"$O.new" && sh -n "$O.new" && mv "$O.new" "$O"
}

# A pid file may be older than the container's start: its number may be another process's by now.
tell() {
  read -r pid <"$R/run/sshd.pid"
  grep -qs '^sshd' "/proc/$pid/comm" || pid=
  [ "$pid" ] || [ "$R" ] || pid=$(grep -ls '^sshd: .*\[listener' /proc/[0-9]?*/cmdline | cut -d/ -f3)
  # shellcheck disable=SC2086
  kill -HUP $pid
}

refuse() {
  echo "hostkey.sh: $1" >&2
  exit 1
}

main "$@"
