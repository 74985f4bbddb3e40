# shellcheck shell=bash
# Set-up, sourced by the commands beside it. All talk goes to stderr, so that a command's stdout is its own.
#
#   need_venv      .venv in the checkout with the project (editable) and its development tools
#   need_sandbox   need_venv, the system's packages and the downloads; sets $cache to where they are
#
# Both cost well under a second when there is nothing to do. $PYTHON names the interpreter to use (>= 3.11).

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
uid=$(id -u)
stamp=$venv/.selfhost-setup
cd -- "$root"

# What the user's shell may carry that would load other code than ours, or send pip's installs elsewhere.
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONWARNINGS PYTHONOPTIMIZE PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON VIRTUAL_ENV
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

not_set_up() { # what is wrong, what to do next
  say "error: $1"
  say "  $2"
  exit 3
}

need_venv() {
  if venv_is_current; then return; fi
  one_setup_at_a_time
  if ! venv_is_current; then make_venv; fi # another one may have made it while we waited
  exec 9<&-
}

need_sandbox() {
  need_venv
  if cache=$("$venv/bin/python" -m selfhost_cli.sandbox.assets --ready "${cache_option[@]}"); then return; fi
  one_setup_at_a_time
  local missing
  missing=$("$venv/bin/python" -m selfhost_cli.sandbox.assets --missing "${cache_option[@]}")
  # shellcheck disable=SC2086  # one package a word
  install_packages $missing
  exec 9<&-
  cache=$("$venv/bin/python" -m selfhost_cli.sandbox.assets "${cache_option[@]}") || exit
}

# --- the virtual environment --------------------------------------------------------------------------------------

# Where the downloads are, when not in the user's cache directory.
cache_option=()
if [[ -n ${SELFHOST_TEST_CACHE:-} ]]; then cache_option=(--cache "$SELFHOST_TEST_CACHE"); fi

one_setup_at_a_time() {
  if ! command -v flock >/dev/null; then return; fi
  exec 9<"$root" # the folder itself: no lock file to leave behind
  if ! flock -n 9; then
    say "another set-up is at work here; waiting for it"
    flock 9
  fi
}

# The stamp says for what the environment was made: another place, another Python or other requirements need work.
stamp_text() {
  printf '%s\n%s\n%s\n' "$root" "$(sha256sum <"$root/pyproject.toml")" "$("$venv/bin/python" -c 'import sys; print(sys.version)')"
}

venv_is_usable() {
  [[ -x $venv/bin/python ]] && "$venv/bin/python" -c 'import pip' 2>/dev/null && grep -qsF -- "$venv" "$venv/bin/activate"
}

venv_is_current() {
  [[ -r $stamp && -x $venv/bin/selfhost ]] && fits_wish && [[ $(stamp_text 2>/dev/null) == "$(<"$stamp")" ]]
}

# $PYTHON, when given, must be the interpreter below .venv.
fits_wish() {
  if [[ -z ${PYTHON:-} ]]; then return; fi
  local ask='import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))'
  [[ $("$venv/bin/python" -c "$ask" 2>/dev/null) == "$("$PYTHON" -c "$ask" 2>/dev/null)" ]]
}

make_venv() {
  if [[ ! -w $root ]] || [[ -e $venv && ! -O $venv && $uid -ne 0 ]]; then
    not_set_up "cannot make $venv as $(id -un)" "remove it if another user made it, or clone the checkout to a folder of your own"
  fi
  if ! venv_is_usable || ! fits_wish; then
    find_python
    say "set-up: making .venv with $python"
    rm -rf -- "$venv"
    "$python" -m venv -- "$venv"
  fi
  say "set-up: installing selfhost and its development tools into .venv"
  "$venv/bin/python" -m pip install --quiet --editable "${root}[dev]" 1>&2 ||
    not_set_up "pip could not install the project (its words are above)" "check the network, then run it again"
  stamp_text >"$stamp"
}

# Set $python to an interpreter that is new enough and can make virtual environments; install what it lacks for that.
find_python() {
  local candidate lacking=""
  for candidate in ${PYTHON:+"$PYTHON"} $(python_names); do
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if [[ -n ${PYTHON:-} ]]; then not_set_up "PYTHON=$PYTHON is not a Python >= 3.11" "name another one, or none"; fi
      continue
    fi
    python=$("$candidate" -c 'import sys; print(sys.executable)')
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then return; fi
    if [[ $(readlink -f -- "$python") == /usr/bin/python3.* ]]; then lacking=${lacking:-$python}; fi
    if [[ -n ${PYTHON:-} ]]; then break; fi
  done
  if [[ -z $lacking ]]; then not_set_up "there is no Python >= 3.11 here that can make virtual environments" "install one, or name it: PYTHON=/path/to/python3 $0"; fi
  python=$lacking
  install_for_python "$python"
}

python_names() {
  if [[ -z ${PYTHON:-} ]]; then printf '%s\n' python3 /usr/bin/python3 python3.{11..19}; fi
}

# Debian keeps ensurepip in a package of its own. Ask for everything else in the same breath: apt is slow to start.
install_for_python() { # python
  local version packages
  version=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  packages=$(PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$root "$1" -m selfhost_cli.sandbox.assets --missing || true)
  # shellcheck disable=SC2086  # one package a word
  install_packages "$version" ${packages//python3-venv/}
}

# --- the system ---------------------------------------------------------------------------------------------------

install_packages() { # packages…
  if (($# == 0)); then return; fi
  local keep_off=""
  if [[ " $* " == *" openssh-server "* ]]; then keep_off=/etc/ssh/sshd_not_to_be_run; fi
  if ! command -v apt-get >/dev/null; then not_set_up "missing here: $*" "install these (Debian's names) with this system's package manager"; fi
  if ((uid != 0)); then
    not_set_up "missing on this machine: $*" "run: ${keep_off:+sudo install -D -m 644 /dev/null $keep_off && }sudo apt-get install -y $*"
  fi
  # Debian starts an sshd as soon as it is installed, and at every boot. The sandbox runs its own on loopback and never
  # that one; nobody asked for a login service on this machine. Debian's own switch for that is this file.
  if [[ -n $keep_off && ! -e $keep_off ]]; then
    install -D -m 644 /dev/null "$keep_off"
    say "set-up: openssh-server's own service stays off ($keep_off; remove the file to have it)"
  fi
  say "set-up: installing with apt: $*"
  export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends "$@"; } >/dev/null </dev/null ||
    not_set_up "apt could not install $*" "see what it says above, then run it again"
}

# --- tests --------------------------------------------------------------------------------------------------------

# Run pytest with these arguments, then say how many ran and what was skipped and why. Ends with pytest's exit code.
# $SELFHOST_TEST_WORKERS > 0: that many processes; tests of one xdist group stay together.
run_tests() { # pytest's arguments…
  local report code=0 workers=() name
  if ((${SELFHOST_TEST_WORKERS:-2} > 0)); then workers=(-n "${SELFHOST_TEST_WORKERS:-2}" --dist loadgroup); fi
  # The user's own settings and keys are none of the tests' business.
  for name in $(compgen -e SELFHOST_) $(compgen -e VAST_); do
    if [[ $name != SELFHOST_TEST_* ]]; then unset "$name"; fi
  done
  export SELFHOST_TEST_CACHE=$cache
  report=$(mktemp)
  # shellcheck disable=SC2064  # the name is known now
  trap "rm -f -- '$report'" EXIT
  "$venv/bin/pytest" --junit-xml="$report" "${workers[@]}" "$@" || code=$?
  if [[ -s $report ]]; then "$venv/bin/python" scripts/summary.py "$report"; fi
  exit "$code"
}
