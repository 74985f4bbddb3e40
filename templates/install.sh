#!/bin/sh
# Installs engine, model and proxy of selfhost under ~/.selfhost, and starts them. See usage() below.
#
# Progress goes to stdout, one line each: @selfhost<TAB>step<TAB>status<TAB>done<TAB>total<TAB>text
# (status: start progress done skip fail, or refuse for what would fail on every other box, too)
# (a person's terminal gets plain lines); everything else goes to ~/.selfhost/log/install.log.
# A step is skipped when its inputs are those of its last success (steps/NAME) and its result is verified to be there.
# Steps that need nothing of each other run at once, so their lines alternate.

# Parts that run side by side have names of their own on purpose.
# shellcheck disable=SC2030,SC2031
umask 077

usage() {
  cat <<'HELP'
usage: sh install.sh [--force] [--engine NAME] [--model NAME] [--context TOKENS] [--skip-redis] [--help]

Installs what a box of selfhost needs (tools, engine, model, proxy) under ~/.selfhost and starts it on 127.0.0.1.
Running it again changes nothing that is already right.

  --engine NAME     ollama (the default; one that the machine has is used when it is new enough), or
                    llamacpp (CPU only; wants the address of a GGUF file in SELFHOST_MODEL_URL)
  --model NAME      the model to serve: for ollama any tag of its library (default: qwen3-coder:30b)
  --context TOKENS  its context (default: 65536)
  --force           do every step again; downloads that verify are kept
  --skip-redis      accepted for old habits: the cache lives in the front, on your own machine

Settings come from these flags, then ~/.selfhost/run/install.env (written by `selfhost up`, or by this script with a
token of its own making), then SELFHOST_* variables of the environment, then the defaults. It runs as any user; apt-get
is used only by root, and only for a tool that is missing. Log: ~/.selfhost/log/install.log
HELP
}

main() {
  options "$@"
  HERE=$(cd "$(dirname "$0")" && pwd)
  mkdir -p "$HOME/.selfhost" && cd "$HOME/.selfhost" || exit 1
  mkdir -p run log bin downloads steps tmp
  exec 3>&1 4>&2 >>log/install.log 2>&1 </dev/null
  # Nothing outside this directory may change: no temporary files, and no bytecode beside the system's own modules.
  export TMPDIR="$HOME/.selfhost/tmp" PYTHONDONTWRITEBYTECODE=1
  unset PYTHONPATH PYTHONHOME PYTHONPYCACHEPREFIX
  # When the laptop goes away in the middle, what was begun is finished: the watchdog is there for the money.
  trap '' PIPE
  trap 'exit 130' INT TERM HUP
  trap 'end_all; rm -rf tmp' EXIT
  job='' jobs='' holder='' TMP=tmp

  STEP=tools
  one_at_a_time
  settings
  [ -z "$skip_redis" ] || note "no Redis here: the cache lives in the front, on your own machine"
  check_engine
  step tools "$TOOLS"
  bring_proxy
  together engine_side proxy_side
  step start "$(part_inputs engine) $(part_inputs proxy)"
}

engine_side() {
  case $ENGINE in
    # Its server is what pulls the model.
    ollama) bring_engine && bring_model ;;
    llamacpp) together bring_model bring_engine && begin engine ;;
  esac
}

bring_engine() {
  case $ENGINE in
    # Its checksum is no input: one that was not known before changes nothing.
    ollama) step engine "$ENGINE $SELFHOST_OLLAMA_VERSION $IMAGE_OLLAMA $OLLAMA_URL $("$PY" -V)" ;;
    llamacpp) step engine "$ENGINE $SELFHOST_ENGINE_REQUIREMENTS $("$PY" -V)" ;;
  esac
}

bring_model() {
  case $ENGINE in
    ollama) step model "$ENGINE $MODEL $SELFHOST_REGISTRY" ;;
    llamacpp) step model "$ENGINE $MODEL ${SELFHOST_MODEL_SHA256:-$SELFHOST_MODEL_URL}" ;;
  esac
}

proxy_side() {
  step proxy "$SELFHOST_PROXY_REQUIREMENTS $("$PY" -V)"
  begin proxy
}

options() {
  force='' skip_redis='' opt_engine='' opt_model='' opt_context=''
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --force) force=1 ;;
      --skip-redis) skip_redis=1 ;;
      --engine | --model | --context)
        [ $# -gt 1 ] || misused "$1 wants a value"
        case $1 in
          --engine) opt_engine=$2 ;;
          --model) opt_model=$2 ;;
          --context) opt_context=$2 ;;
        esac
        shift
        ;;
      *) misused "unknown option $1" ;;
    esac
    shift
  done
  case $opt_context in *[!0-9]*) misused "--context wants a number of tokens" ;; esac
}

misused() {
  echo "install.sh: $1" >&2
  usage >&2
  exit 2
}

# An install whose laptop went away may still be running: wait for it, then see what is left to do.
one_at_a_time() {
  exec 7>>run/install.lock
  until flock -n 7; do
    say progress '' '' "waiting for an earlier install to end"
    flock -w 5 7 && break
  done
}

# --- settings ---------------------------------------------------------------------------------------------------------

settings() {
  # What the create call said of this box; its key is the watchdog's alone.
  # shellcheck source=/dev/null
  [ ! -f run/box.env ] || . run/box.env
  unset CONTAINER_API_KEY
  # shellcheck source=/dev/null
  [ ! -f run/install.env ] || . run/install.env
  ENGINE=${opt_engine:-${SELFHOST_ENGINE:-ollama}}
  MODEL=${opt_model:-${SELFHOST_MODEL:-qwen3-coder:30b}}
  CONTEXT=${opt_context:-${SELFHOST_CONTEXT:-65536}}
  TOKEN=${SELFHOST_TOKEN:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}
  : "${SELFHOST_SLOTS:=1}" "${SELFHOST_KV_CACHE_TYPE:=q8_0}"
  : "${SELFHOST_MODEL_URL=}" "${SELFHOST_MODEL_SHA256=}" "${SELFHOST_MODEL_BYTES=}" "${SELFHOST_PIP_ARGS=}"
  : "${SELFHOST_PROXY_REQUIREMENTS=aiohttp>=3.11 orjson>=3.10 prometheus-client>=0.22}" "${SELFHOST_ENGINE_REQUIREMENTS=xllamacpp}" "${SELFHOST_VERSION=}"
  : "${SELFHOST_OLLAMA_VERSION:=0.34.0}" "${SELFHOST_OLLAMA_SHA256=}" "${SELFHOST_OLLAMA_BYTES=}" "${SELFHOST_REGISTRY=}" "${SELFHOST_PACKAGES=}"
  : "${SELFHOST_OLLAMA_URL:=https://ollama.com/download/ollama-linux-amd64.tar.zst}"
  OLLAMA_URL="$SELFHOST_OLLAMA_URL?version=$SELFHOST_OLLAMA_VERSION"
  NAME=${SELFHOST_MODEL_URL##*/}
  NAME=${NAME%%\?*}
  if [ ! -f run/install.env ] || [ "$opt_engine$opt_model$opt_context" ]; then
    write_settings >run/install.env.new && mv run/install.env.new run/install.env
  fi
  # Run by hand from elsewhere (a checkout, say): bring the other parts along.
  [ "$HERE" = "$(pwd)/bin" ] || bring_parts
}

write_settings() {
  for pair in "ENGINE=$ENGINE" "MODEL=$MODEL" "CONTEXT=$CONTEXT" "SLOTS=$SELFHOST_SLOTS" \
    "KV_CACHE_TYPE=$SELFHOST_KV_CACHE_TYPE" "TOKEN=$TOKEN" "VERSION=$SELFHOST_VERSION" \
    "MODEL_URL=$SELFHOST_MODEL_URL" "MODEL_SHA256=$SELFHOST_MODEL_SHA256" "MODEL_BYTES=$SELFHOST_MODEL_BYTES" \
    "PIP_ARGS=$SELFHOST_PIP_ARGS" "PROXY_REQUIREMENTS=$SELFHOST_PROXY_REQUIREMENTS" \
    "ENGINE_REQUIREMENTS=$SELFHOST_ENGINE_REQUIREMENTS" "OLLAMA_VERSION=$SELFHOST_OLLAMA_VERSION" \
    "OLLAMA_URL=$SELFHOST_OLLAMA_URL" "OLLAMA_SHA256=$SELFHOST_OLLAMA_SHA256" \
    "OLLAMA_BYTES=$SELFHOST_OLLAMA_BYTES" "REGISTRY=$SELFHOST_REGISTRY" "PACKAGES=$SELFHOST_PACKAGES"; do
    printf "SELFHOST_%s='%s'\n" "${pair%%=*}" "$(printf %s "${pair#*=}" | sed "s/'/'\\\\''/g")"
  done
}

bring_parts() {
  for part in install.sh start.sh stop.sh llamacpp.py ollama.py proxy.zip; do
    [ ! -f "$HERE/$part" ] || cp "$HERE/$part" bin/
  done
}

# In a checkout the proxy is still to be packed, which takes a Python; before the long downloads, which need none.
bring_proxy() {
  STEP=proxy
  if [ "$HERE" != "$(pwd)/bin" ] && [ -f "$HERE/../selfhost_cli/payload.py" ]; then
    PYTHONPATH=$HERE/.. "$PY" -c \
      'import sys; from selfhost_cli.payload import proxy_zip; sys.stdout.buffer.write(proxy_zip())' >tmp/proxy.zip ||
      fail "the proxy of $HERE/.. could not be packed"
    mv tmp/proxy.zip bin/proxy.zip
  fi
  [ -s bin/proxy.zip ] || fail "proxy.zip is not in ~/.selfhost/bin: \`selfhost up\` puts it there"
}

# Before anything is downloaded: every second here is paid for.
check_engine() {
  STEP=engine
  case $ENGINE in
    llamacpp)
      if [ -z "${SELFHOST_SIMULATED_GPU-}" ] && command -v nvidia-smi >/dev/null; then
        fail "llamacpp is refused on a box with a GPU: that wheel is CPU only; the engine for GPU boxes is ollama"
      fi
      [ "$NAME" ] || fail "llamacpp wants the address of a GGUF file in SELFHOST_MODEL_URL"
      ;;
    ollama)
      find_image_ollama
      if [ -z "$IMAGE_OLLAMA" ]; then
        [ "$(uname -m)" = x86_64 ] || fail "there is no Ollama for this machine: $(uname -m) instead of x86_64"
        TOOLS="$TOOLS tar zstd"
      fi
      ;;
    *) fail "no engine '$ENGINE': there are ollama and llamacpp" ;;
  esac
}

# --- steps ------------------------------------------------------------------------------------------------------------

# together FUNCTION…: all of them at once, each in a shell of its own. The first that fails ends the others, and this one.
together() {
  for branch; do
    (
      # A subshell has no traps, and what the others run is not its to end.
      trap 'exit 130' INT TERM HUP
      trap 'end_all' EXIT
      job='' jobs='' holder='' TMP=$TMP/$branch
      mkdir -p "$TMP" && "$branch"
    ) &
    jobs="$jobs $!"
  done
  while [ "$jobs" ]; do
    sleep 0.05
    running=''
    for one in $jobs; do
      if kill -0 "$one" 2>/dev/null; then running="$running $one"; else wait "$one" || broken $?; fi
    done
    jobs=$running
  done
}

# broken STATUS: a branch has said itself why it failed, unless it was killed.
broken() {
  [ "$1" = 1 ] || fail "a part of the install ended with status $1"
  exit 1
}

# step NAME INPUTS: do_NAME, unless it was done with these inputs before and have_NAME still finds the result.
step() {
  STEP=$1 DONE=''
  inputs=$(digest "$2")
  if [ -z "$force" ] && [ "$(cat "steps/$1" 2>/dev/null)" = "$inputs" ] && "have_$1"; then
    say skip '' '' "already there"
    return
  fi
  say start
  rm -f "steps/$1"
  "do_$1"
  "have_$1" || fail "the result of this step is not there"
  echo "$inputs" >"steps/$1.new" && mv "steps/$1.new" "steps/$1"
  say 'done' '' '' "$DONE"
}

TOOLS='curl python3 python3-venv flock setsid awk sha256sum stat df tail tee mkfifo od sed'

have_tools() {
  [ -z "$(missing_tools)" ] && find_python
}

do_tools() {
  missing=$(missing_tools)
  if [ "$missing" ]; then
    # shellcheck disable=SC2046
    packages=$(words $(for tool in $missing; do package_of "$tool"; done | tr ' ' '\n' | sort -u))
    if [ "$SELFHOST_PACKAGES" = no ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      fail "missing on this box: $missing; as root: apt-get install -y $packages"
    fi
    busy "installing $packages" apt_install "$packages" || fail "apt-get could not install $packages"
    missing=$(missing_tools)
    [ -z "$missing" ] || fail "still missing after apt-get: $missing"
  fi
  find_python || fail "$(python3 -V) found, but 3.11 or newer is needed"
  [ -f bin/start.sh ] && [ -f bin/stop.sh ] || fail "start.sh or stop.sh is not in ~/.selfhost/bin: \`selfhost up\` puts them there"
  DONE=$("$PY" -V)
}

missing_tools() {
  # shellcheck disable=SC2046
  words $(for tool in $TOOLS; do
    case $tool in
      python3-venv) ! command -v python3 >/dev/null || can_make_venv || echo "$tool" ;;
      *) command -v "$tool" >/dev/null || echo "$tool" ;;
    esac
  done)
}

words() {
  echo "$*"
}

can_make_venv() {
  python3 -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("venv") and (u.find_spec("pip") or u.find_spec("ensurepip"))))'
}

package_of() {
  case $1 in
    curl) echo curl ca-certificates ;;
    python3) echo python3 python3-venv ;;
    python3-venv) echo python3-venv ;;
    flock | setsid) echo util-linux ;;
    awk) echo mawk ;;
    sed | tar | zstd) echo "$1" ;;
    *) echo coreutils ;;
  esac
}

apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update
  # shellcheck disable=SC2086
  apt-get install -y --no-install-recommends $1
}

# Sets PY to a Python that is new enough.
find_python() {
  for PY in python3 python3.14 python3.13 python3.12 python3.11; do
    "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
  done
  return 1
}

have_model() {
  case $ENGINE in
    ollama) ollama_py have --model "$MODEL" ;;
    llamacpp)
      [ -s "downloads/$NAME" ] && { [ -z "$SELFHOST_MODEL_BYTES" ] || [ "$(size_of "downloads/$NAME")" = "$SELFHOST_MODEL_BYTES" ]; }
      ;;
  esac
}

do_model() {
  case $ENGINE in
    ollama) pull ;;
    llamacpp) fetch "$NAME" "$SELFHOST_MODEL_URL" "$SELFHOST_MODEL_BYTES" "$SELFHOST_MODEL_SHA256" ;;
  esac
}

# The server pulls; ollama.py asks it to, and tells how far it is: DONE TOTAL TEXT.
pull() {
  begin engine
  began=$(date +%s)
  until engine_answers; do
    not_dying engine
    [ $(($(date +%s) - began)) -lt 120 ] || fail "the engine does not answer" log/engine.log
    sleep 0.1
  done
  began=$(date +%s)
  free=$(free_mb)
  : >"$TMP/pull"
  ollama_py pull --model "$MODEL" --context "$CONTEXT" --registry "$SELFHOST_REGISTRY" ${free:+--free-mb "$free"} \
    --stall "${SELFHOST_STALL_S:-30}" --slow "${SELFHOST_SLOW_S:-20}" >"$TMP/pull" 2>"$TMP/why" 3>&- 4>&- 7>&- &
  job=$!
  # Read on and on while it grows.
  exec 5<"$TMP/pull"
  heard=$began pulled='' whole='' text="asking for $MODEL"
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.1
    tell
    now=$(date +%s)
    # While it checks 19 GB it is silent.
    [ $((now - heard)) -lt 5 ] || { heard=$now && say progress "$pulled" "$whole" "$text"; }
  done
  wait "$job"
  code=$?
  job=''
  tell
  exec 5<&-
  cat "$TMP/why"
  [ "$code" != 3 ] || refuse "$(tail -n 1 "$TMP/why")"
  [ "$code" = 0 ] || fail "$(tail -n 1 "$TMP/why")"
  DONE="$(mb "${whole:-0}") MB in $(($(date +%s) - began)) s"
}

tell() {
  while read -r pulled_now whole_now text_now <&5; do
    pulled=$pulled_now whole=$whole_now text=$text_now heard=$(date +%s)
    say progress "$pulled" "$whole" "$text"
  done
}

ollama_py() {
  engine/venv/bin/python -IS bin/ollama.py "$@"
}

engine_answers() {
  [ -s run/engine.port ] && curl -qsSo /dev/null --noproxy '*' -m 5 "http://127.0.0.1:$(cat run/engine.port)/api/version"
}

# fetch NAME URL BYTES SHA256 [DIR]: brings downloads/NAME, where something of it is already there only the rest.
# With DIR it is unpacked there while it comes; $followed is the sum of what was, "" where it could not be.
fetch() {
  file=downloads/$1 followed=''
  if [ -f "$file" ]; then
    promised "$file" "$3" "$4" && DONE="$(mb "$(size_of "$file")") MB, already there" && return
    rm -f "$file"
  fi
  # The head start of onstart.sh holds this lock: its file grows meanwhile, and what it leaves is taken over.
  exec 8>>"$file.part"
  follow "$file.part" "${5-}"
  while ! flock -n 8; do
    say progress "$(size_of "$file.part")" "$3" "$1 (begun at the start of the box)"
    flock -w 1 8 && break
  done
  began=$(date +%s)
  download "$2" "$file.part" "$3" "$1"
  size=$(size_of "$file.part")
  say progress "$size" "$size" "checking $1"
  caught_up "checking $1"
  if ! promised "$file.part" "$3" "$4" "$followed"; then
    rm -rf "$file.part" "${5:-$TMP/pack}"
    [ -z "${hint-}" ] || refuse "$1 is not the promised file: $differs; it was deleted$hint"
    fail "$1 is not the promised file: $differs; it was deleted"
  fi
  mv "$file.part" "$file"
  exec 8>&-
  DONE="$(mb "$size") MB in $(($(date +%s) - began)) s"
}

# follow FILE [DIR]: reads what comes of FILE as it comes, for its sum, which takes no time then in the end; and unpacks it.
# Nothing of that counts before the sum of these very bytes is the right one: see caught_up, promised and unpack.
follow() {
  rm -f "$TMP/bytes" "$TMP/pack" && mkfifo "$TMP/bytes" "$TMP/pack" || return
  # As long as this lives, more may come.
  sleep 86400 3>&- 4>&- 7>&- 8>&- &
  holder=$!
  tail -c +1 -s 0.1 --pid="$holder" -f "$1" >"$TMP/bytes" 3>&- 4>&- 7>&- 8>&- &
  follower=$!
  if [ "$2" ]; then
    (exec 3>&- 4>&- 7>&- 8>&- && untar "$TMP/pack" "$2") &
    unpacker=$!
    (exec 3>&- 4>&- 7>&- 8>&- <"$TMP/bytes" && tee "$TMP/pack" | sha256sum >"$TMP/followed") &
  else
    unpacker=''
    (exec 3>&- 4>&- 7>&- 8>&- <"$TMP/bytes" && exec sha256sum >"$TMP/followed") &
  fi
  summer=$!
}

# caught_up TEXT: FILE is whole, and so is soon what follows it. Sets $followed to the sum of what was read (and unpacked).
caught_up() {
  [ "$holder" ] || return 0
  kill "$holder" && wait "$holder" 2>/dev/null
  holder=''
  await "$summer" "$1"
  [ "$code" = 0 ] && followed=$(cut -d' ' -f1 "$TMP/followed")
  [ -z "$unpacker" ] || await "$unpacker" "unpacking" || followed=''
}

# download URL FILE BYTES NAME: goes on where FILE ends, over cuts and stalls; gives up after 5 tries without a gain.
download() {
  tries=0 best=0 gained=$(date +%s) fastest=0 slowed=0
  while :; do
    have=$(size_of "$2")
    [ "$have" = "$3" ] && return
    # Longer than it can be: nothing of it can be trusted.
    [ -n "$3" ] && [ "$have" -gt "$3" ] && : >"$2" && have=0
    [ -z "$3" ] || enough_disk $(($3 - have)) "$4"
    say progress "$have" "$3" "$4"
    curl -qfsSL --proto '=http,https' --noproxy 127.0.0.1,localhost -C - --connect-timeout 20 \
      -w '%{http_code}' -o "$2" "$1" 3>&- 4>&- 7>&- 8>&- >"$TMP/status" &
    job=$!
    watch_file "$2" "$3" "$4"
    wait "$job"
    code=$?
    job=''
    # All that the server has for us came: where it is not of the promised size, it is another file.
    [ "$code" = 0 ] && return
    [ "$(size_of "$2")" = "$3" ] && return
    case $code-$(cat "$TMP/status") in
      # It cannot be continued (no ranges there, or none behind what is here): from the start.
      33-* | 36-* | 22-416) : >"$2" ;;
      23-*) fail "$4 cannot be written: is the disk full? $(free_mb) MB are free" ;;
    esac
    tries=$((tries + 1))
    # More than ever: after a new beginning, what comes again is no gain.
    [ "$(size_of "$2")" -le "$best" ] || { best=$(size_of "$2") tries=0 gained=$(date +%s); }
    [ "$tries" -lt 5 ] || patient || fail "the download of $4 makes no progress at $(mb "$best") MB: $(curl_status "$code")"
    say progress "$(size_of "$2")" "$3" "$4: interrupted ($(curl_status "$code")), going on"
    sleep "$tries"
  done
}

# A server that is busy for a minute is no reason to lose a box that is paid for; one that says no will say it again.
patient() {
  case $code-$(cat "$TMP/status") in
    22-408 | 22-425 | 22-429) ;;
    22-4*) return 1 ;;
  esac
  [ $(($(date +%s) - gained)) -lt "${SELFHOST_PATIENCE_S:-180}" ]
}

# watch_file FILE TOTAL NAME: reports its growth about once a second while $job runs, and ends a job that has stalled or,
# three times at most, one that has become slow: another connection may be as fast as this one was.
watch_file() {
  ticks=0 seen='' since=$(date +%s) ended=''
  slow_since=0 mark=$(size_of "$1") all_mark=$(received)
  # In ticks: a quarter of the time after which slow is too slow.
  slice=$((${SELFHOST_SLOW_S:-20} * 5 / 4)) && [ "$slice" -gt 0 ] || slice=1
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.2
    ticks=$((ticks + 1))
    [ $((ticks % slice)) != 0 ] || ! slow "$1" || { kill "$job" && ended=slow slowed=$((slowed + 1)); }
    [ $((ticks % 5)) = 0 ] || continue
    now=$(date +%s) size=$(size_of "$1")
    say progress "$size" "$2" "$3"
    [ "$size" = "$seen" ] || { seen=$size since=$now; }
    [ $((now - since)) -lt "${SELFHOST_STALL_S:-30}" ] || { kill "$job" && ended=stalled; }
  done
}

# slow FILE: for four slices it has come with less than a quarter of its fastest, and that is not because other downloads
# of this box have the rest.
slow() {
  now_there=$(size_of "$1") all_there=$(received)
  gain=$((now_there - mark)) all=$((all_there - all_mark)) mark=$now_there all_mark=$all_there
  [ "$gain" -le "$fastest" ] || fastest=$gain
  if [ $((gain * 4)) -ge "$fastest" ] || [ $((all * 2)) -ge "$fastest" ]; then slow_since=0; else slow_since=$((slow_since + 1)); fi
  [ "$slow_since" -ge 4 ] && [ "$slowed" -lt 3 ]
}

# Bytes that came over all interfaces but the loopback.
received() {
  awk '{ sub(/:/, " ") } $1 != "lo" && $2 ~ /^[0-9]+$/ { sum += $2 } END { printf "%.0f", sum }' \
    "${SELFHOST_NET_DEV:-/proc/net/dev}" 2>/dev/null || echo 0
}

curl_status() {
  case $1 in
    22) echo "HTTP status $(cat "$TMP/status")" ;;
    143) [ "$ended" = slow ] && echo "it became slow" || echo "it stalled" ;;
    *) echo "curl ended with status $1" ;;
  esac
}

# 200 MB beside the file itself, for the venvs and the logs.
enough_disk() {
  free=$(free_mb)
  [ -z "$free" ] || [ "$free" -ge $(($(mb "$1") + 200)) ] ||
    fail "the disk is too small for $2: $(mb "$1") MB are still to come and 200 MB must stay, but only $free MB are free"
}

free_mb() {
  df -Pk downloads | awk 'NR == 2 { printf "%d", $4 * 1024 / 1e6 }'
}

# promised FILE BYTES SHA256 [SUM]: it is what it should be, as far as that is known; else $differs says what is wrong.
# SUM: of its bytes as they came.
promised() {
  differs="it has $(size_of "$1") bytes, not $2"
  [ -z "$2" ] || [ "$(size_of "$1")" = "$2" ] || return 1
  differs="its sha256 differs from $3"
  [ -z "$3" ] || [ "${4-}" = "$3" ] || { busy "checking ${1##*/}" checksum "$1" && [ "$(cat "$TMP/sum")" = "$3" ]; }
}

checksum() {
  sha256sum <"$1" | cut -d' ' -f1 >"$TMP/sum"
}

have_engine() {
  case $ENGINE in
    ollama) have_ollama ;;
    llamacpp) satisfied engine/venv "$SELFHOST_ENGINE_REQUIREMENTS" && [ -f bin/llamacpp.py ] ;;
  esac
}

do_engine() {
  case $ENGINE in
    ollama) do_ollama ;;
    llamacpp)
      [ -f bin/llamacpp.py ] || fail "llamacpp.py is not in ~/.selfhost/bin: \`selfhost up\` puts it there"
      make_venv engine/venv "$SELFHOST_ENGINE_REQUIREMENTS"
      ;;
  esac
}

# engine/bin/ollama is the one that is used: the image's, or ours.
have_ollama() {
  [ -f bin/ollama.py ] && [ -x engine/venv/bin/python ] && [ -x engine/bin/ollama ] &&
    [ "$(readlink engine/bin/ollama)" = "${IMAGE_OLLAMA:-../ollama/bin/ollama}" ] && { [ "$IMAGE_OLLAMA" ] || unpacked; }
}

do_ollama() {
  [ -f bin/ollama.py ] || fail "ollama.py is not in ~/.selfhost/bin: \`selfhost up\` puts it there"
  # Only for ollama.py, which needs no package.
  make_venv engine/venv ''
  mkdir -p engine/bin engine/home
  if [ "$IMAGE_OLLAMA" ]; then
    rm -rf engine/ollama run/archive
    DONE="Ollama $image_version of the image"
  else
    [ -z "$image_version" ] || note "the image's Ollama $image_version is too old: $SELFHOST_OLLAMA_VERSION is installed beside it"
    { [ -z "$force" ] && unpacked; } || unpack
    DONE="Ollama $SELFHOST_OLLAMA_VERSION"
  fi
  ln -sfn "${IMAGE_OLLAMA:-../ollama/bin/ollama}" engine/bin/ollama || fail "engine/bin/ollama cannot be made"
}

# Sets IMAGE_OLLAMA when there is one on the PATH that is new enough, and image_version to whatever its version is.
find_image_ollama() {
  image_version=''
  IMAGE_OLLAMA=$(command -v ollama) || return 0
  image_version=$(ollama_version "$IMAGE_OLLAMA")
  oldest=$(printf '%s\n' "$SELFHOST_OLLAMA_VERSION" "${image_version:-0}" | sort -V | head -n 1)
  [ "$oldest" = "$SELFHOST_OLLAMA_VERSION" ] || IMAGE_OLLAMA=''
}

# It asks a server first: nobody answers on that port.
ollama_version() {
  said=$(HOME="$PWD/engine/home" OLLAMA_HOST=127.0.0.1:9 "$1" --version 2>&1)
  echo "$said" >&2
  echo "$said" | sed -n 's/.*version is v\{0,1\}\([0-9][0-9A-Za-z.+-]*\).*/\1/p' | tail -n 1
}

# Ours is there, in the version and from the archive that are wanted.
unpacked() {
  recorded && [ "$archive_version" = "$SELFHOST_OLLAMA_VERSION" ] &&
    { [ -z "$SELFHOST_OLLAMA_SHA256" ] || [ "$archive_sha" = "$SELFHOST_OLLAMA_SHA256" ]; } &&
    [ "$(ollama_version engine/ollama/bin/ollama)" = "$SELFHOST_OLLAMA_VERSION" ]
}

recorded() {
  archive_bytes='' archive_sha='' archive_version='' archive_url=''
  [ -f run/archive ] && read -r archive_bytes archive_sha archive_version archive_url <run/archive
}

# The archive stays in downloads/: --force and repairs need it, and onstart.sh would fetch it again at every start.
unpack() {
  archive=${SELFHOST_OLLAMA_URL##*/}
  bytes=$SELFHOST_OLLAMA_BYTES sha=$SELFHOST_OLLAMA_SHA256
  # No list of the makers is there to check it against. Without a record of the laptop's, what proved itself here counts.
  [ -z "$sha" ] && recorded && [ "$archive_url" = "$OLLAMA_URL" ] && bytes=$archive_bytes sha=$archive_sha
  [ -z "$SELFHOST_OLLAMA_SHA256" ] || hint=". If it was released anew, delete its line in the file 'archives' of selfhost's state directory"
  # A file of which nothing is known may be of another version.
  [ "$sha" ] || rm -f "downloads/$archive"
  [ "$bytes" ] || bytes=$(remote_size "$OLLAMA_URL")
  rm -rf engine/ollama.new && mkdir -p engine/ollama.new
  fetch "$archive" "$OLLAMA_URL" "$bytes" "$sha" engine/ollama.new
  file=downloads/$archive
  if [ -z "$sha" ]; then
    busy "checking $archive" checksum "$file" || fail "$archive cannot be read"
    sha=$(cat "$TMP/sum")
  fi
  [ "$followed" = "$sha" ] || unpack_again
  [ -x engine/ollama.new/bin/ollama ] || unusable "$archive has no bin/ollama"
  found=$(ollama_version engine/ollama.new/bin/ollama)
  [ "$found" ] || unusable "the Ollama in $archive does not run on this machine"
  [ "$found" = "$SELFHOST_OLLAMA_VERSION" ] || unusable "$archive holds Ollama $found, not $SELFHOST_OLLAMA_VERSION"
  rm -rf engine/ollama && mv engine/ollama.new engine/ollama
  echo "$(size_of "$file") $sha $found $OLLAMA_URL" >run/archive.new && mv run/archive.new run/archive
}

# It was there already, or other bytes than those of the verified file were unpacked, or not all of them.
unpack_again() {
  rm -rf engine/ollama.new && mkdir -p engine/ollama.new
  if ! busy "unpacking $archive" untar "$file" engine/ollama.new; then
    cat "$TMP/why"
    ! grep -q 'No space left' "$TMP/why" || unusable keep "the disk is too small for Ollama: $archive does not fit unpacked"
    unusable "$archive is not a whole archive: $(head -n 1 "$TMP/why")"
  fi
}

untar() {
  exec tar -x -I zstd -f "$1" -C "$2" --no-same-owner 2>"$TMP/why"
}

# unusable [keep] TEXT: nothing of it stays, but an archive that is in order.
unusable() {
  # What is free is worth telling only before it is freed.
  free=$(free_mb)
  rm -rf engine/ollama.new
  [ "$1" != keep ] || fail "$2; $free MB are free"
  rm -f "$file"
  fail "$1; it was deleted"
}

# For a progress with an end, and so that a file that is whole already is not fetched again. "" when it is not told.
remote_size() {
  curl -qfsSLI --proto '=http,https' --noproxy 127.0.0.1,localhost --connect-timeout 20 -m 60 "$1" 3>&- 4>&- 7>&- |
    awk '{ sub(/\r$/, "") } /^HTTP\// { size = "" } tolower($1) == "content-length:" && $2 > 0 { size = $2 } END { print size }'
}

have_proxy() {
  satisfied proxy/venv "$SELFHOST_PROXY_REQUIREMENTS" && [ -s bin/proxy.zip ]
}

do_proxy() {
  make_venv proxy/venv "$SELFHOST_PROXY_REQUIREMENTS"
}

# Every requirement is installed there, in the pinned version where there is one.
satisfied() {
  # shellcheck disable=SC2086
  [ -x "$1/bin/python" ] && (set -f; "$1/bin/python" -I -c '
import re, sys
from importlib.metadata import PackageNotFoundError, version
for requirement in sys.argv[1:]:
    name, _, pinned = re.split(r"[<>!~;\[ ]", requirement)[0].partition("==")
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"{name} is not installed")
    if pinned and found != pinned:
        sys.exit(f"{name} is {found}, not {pinned}")
' $2)
}

# make_venv DIR REQUIREMENTS: one pip serves all venvs, because putting a pip into each takes several seconds.
make_venv() {
  rm -rf "$1"
  if [ -z "$2" ]; then
    "$PY" -m venv --without-pip "$1" || fail "$PY could not make a venv in ~/.selfhost/$1"
  elif "$PY" -c 'import pip, sys; sys.exit([int(n) for n in pip.__version__.split(".")[:2]] < [22, 3])' 2>/dev/null; then
    "$PY" -m venv --without-pip "$1" || fail "$PY could not make a venv in ~/.selfhost/$1"
    busy "installing $2" pip_install "$2" "$PY" -m pip --python "$1/bin/python" || fail "pip could not install $2"
  else
    busy "making a venv" "$PY" -m venv "$1" || fail "$PY could not make a venv in ~/.selfhost/$1"
    busy "installing $2" pip_install "$2" "$1/bin/python" -m pip || fail "pip could not install $2"
  fi
  DONE=$2
}

# pip_install REQUIREMENTS PIP…: when an index was ruled out, neither the user's settings nor a cache may bring one back.
pip_install() {
  requirements=$1
  shift
  case " $SELFHOST_PIP_ARGS " in
    *' --no-index '*)
      # shellcheck disable=SC2046
      unset $(env | sed -n 's/^\(PIP_[A-Z_]*\)=.*/\1/p')
      export PIP_CONFIG_FILE=/dev/null
      ;;
  esac
  set -f
  # shellcheck disable=SC2086
  exec "$@" install --quiet --no-input --no-cache-dir --disable-pip-version-check --progress-bar off \
    $SELFHOST_PIP_ARGS $requirements
}

part_inputs() {
  case $1 in
    engine)
      case $ENGINE in
        ollama) digest "$ENGINE $MODEL $CONTEXT $SELFHOST_SLOTS $SELFHOST_KV_CACHE_TYPE $(readlink engine/bin/ollama) $(files_digest run/archive bin/start.sh bin/ollama.py)" ;;
        llamacpp) digest "$ENGINE $MODEL $CONTEXT $SELFHOST_SLOTS $SELFHOST_KV_CACHE_TYPE $NAME $SELFHOST_MODEL_SHA256 $SELFHOST_ENGINE_REQUIREMENTS $(files_digest bin/start.sh bin/llamacpp.py)" ;;
      esac
      ;;
    proxy) digest "$ENGINE $MODEL $CONTEXT $SELFHOST_SLOTS $TOKEN $SELFHOST_VERSION $SELFHOST_PROXY_REQUIREMENTS $(files_digest bin/start.sh bin/proxy.zip)" ;;
  esac
}

have_start() {
  healthy
}

do_start() {
  for part in engine proxy; do
    [ -e "tmp/begun.$part" ] && again='' || again=$force
    renew "$part" "$again"
  done
  sh bin/start.sh 3>&- 4>&- 7>&- || fail "the parts could not be started"
  began=$(date +%s)
  ticks=0
  until healthy; do
    not_dying engine
    not_dying proxy
    [ ! -s run/engine.problem ] || fail "$(cat run/engine.problem)" log/engine.log
    waited=$(($(date +%s) - began))
    [ "$waited" -lt "${SELFHOST_START_S:-900}" ] ||
      fail "the proxy did not become healthy within $waited s: ${health:-no answer}" log/engine.log log/proxy.log
    [ $((ticks % 30)) = 0 ] && say progress '' '' "waiting for the engine to load the model ($waited s)"
    ticks=$((ticks + 1))
    sleep 0.1
  done
  DONE="healthy on 127.0.0.1:$(cat run/proxy.port)"
}

# begin PART: all is there that it needs, so it need not wait for the step `start`. What runs as it should is left alone.
begin() {
  if [ -z "$force" ] && ! flock -ns "run/$1.lock" true && [ "$(cat "run/$1.inputs" 2>/dev/null)" = "$(part_inputs "$1")" ]; then
    return
  fi
  renew "$1" "$force"
  : >"tmp/begun.$1"
  sh bin/start.sh "$1" 3>&- 4>&- 7>&- || fail "the $1 could not be started"
}

# renew PART [FORCE]: ends it when it runs with other settings than those that hold now, or in vain.
renew() {
  inputs_now=$(part_inputs "$1")
  if [ "${2-}" ] || [ -s "run/$1.problem" ] || [ "$(cat "run/$1.inputs" 2>/dev/null)" != "$inputs_now" ]; then
    sh bin/stop.sh "$1" || fail "the $1 that runs does not end"
    echo "$inputs_now" >"run/$1.inputs"
  fi
  # Where no loop runs, the number is an old one: that port may be somebody else's engine by now. The proxy keeps its.
  [ "$1" != engine ] || ! flock -ns run/engine.lock true || rm -f run/engine.port
  rm -f "run/$1.deaths" "run/$1.problem"
}

not_dying() {
  # Empty for a moment, while it is being written.
  deaths=$(cat "run/$1.deaths" 2>/dev/null)
  [ "${deaths:-0}" -lt 4 ] || fail "the $1 dies again and again" "log/$1.log"
}

# The token goes through stdin, because arguments can be read in ps.
healthy() {
  health=''
  [ -s run/proxy.port ] || return 1
  health=$(printf 'Authorization: Bearer %s\n' "$TOKEN" |
    curl -qsS --noproxy '*' -m 5 -H @- "http://127.0.0.1:$(cat run/proxy.port)/health") || return 1
  printf %s "$health" | "$PY" -IS -c 'import json, sys; sys.exit(json.load(sys.stdin).get("status") != "healthy")'
}

# --- helpers ----------------------------------------------------------------------------------------------------------

say() { # STATUS [DONE [TOTAL [TEXT]]]
  if [ -t 3 ]; then
    printf '%-7s %-8s %s %s\n' "$STEP" "$1" "${2:+$(mb "$2")/$(mb "${3:-0}") MB}" "${4-}" >&3
  else
    printf '@selfhost\t%s\t%s\t%s\t%s\t%s\n' "$STEP" "$1" "${2-}" "${3-}" "${4-}" >&3
  fi
  [ "$1" = progress ] || echo "$(date '+%F %T') $STEP $1 ${4-}"
}

note() {
  say progress '' '' "$1"
}

# refuse TEXT: what is asked for cannot be had, on no other box either.
refuse() {
  verdict=refuse
  fail "$@"
}

# fail TEXT [LOG…]: the caller also gets the end of the log that tells why.
fail() {
  say "${verdict-fail}" '' '' "$1"
  text=$1
  shift
  [ $# -gt 0 ] || set -- log/install.log
  for log in "$@"; do
    printf -- '--- the end of ~/.selfhost/%s\n' "$log" >&4
    tail -n 15 "$log" >&4
  done
  echo "install.sh: $text" >&4
  exit 1
}

# busy TEXT COMMAND…: runs it and says every few seconds that it still does, because silence looks like a dead line.
busy() {
  doing=$1
  shift
  # In a group of its own: pip has a child that would outlive it.
  set -m
  "$@" 3>&- 4>&- &
  job=$!
  set +m
  await "$job" "$doing"
  job=''
  return "$code"
}

# await PID TEXT: until it has ended. Sets $code to its status, which is also this one's.
await() {
  ticks=0
  while kill -0 "$1" 2>/dev/null; do
    sleep 0.1
    ticks=$((ticks + 1))
    [ $((ticks % 50)) = 0 ] && say progress '' '' "$2 ($((ticks / 10)) s)"
  done
  wait "$1"
  code=$?
  return "$code"
}

# What this shell runs in the background ends with it; what follows a download does when that one's holder has.
end_all() {
  [ -z "$job" ] || kill -- "-$job" 2>/dev/null
  # shellcheck disable=SC2086
  kill $job $jobs $holder ${holder:+$follower $summer $unpacker} 2>/dev/null
  wait
  [ -z "$holder" ] || rm -rf engine/ollama.new
}

digest() {
  printf %s "$1" | sha256sum | cut -d' ' -f1
}

files_digest() {
  cat "$@" 2>/dev/null | sha256sum | cut -d' ' -f1
}

size_of() {
  stat -c %s "$1" 2>/dev/null || echo 0
}

mb() {
  echo "$1" | awk '{ printf "%d", $1 / 1e6 }'
}

main "$@"
