"""Settings, resolved once: flag > `SELFHOST_*` environment > `config.toml` > default. Remembers the source of each.

Nothing is read at import, and what only some paths need is imported there: this module is on the way of every
`selfhost claude`. `Settings` is the one table of what can be set: field, type, default, help.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

from selfhost_cli.errors import UsageError

LIVE_MARKET = "https://console.vast.ai"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IMAGE = "vastai/base-image:cuda-12.8.1-cudnn-devel-ubuntu24.04-py312"
"""The container image: Ubuntu 24.04 with curl, zstd and Python 3.12; the market's ssh run type adds sshd.

Source: the tag format and the table of variants in https://github.com/vast-ai/base-image (README at commit 004644cc,
read in November 2026). Unverified: never pulled by this project.
"""
IMAGE_GB = 8.0
"""What to count on for pulling it; our estimate for a CUDA development image. Hosts often have the layers already."""
OLLAMA_GB = 2.0
"""What to count on for Ollama's release archive with its CUDA libraries; our estimate, unpacked about twice that."""
LIST_PRICE = "default: Claude Sonnet 5.5's public list price as of November 2026"
"""Source: the model's page at platform.claude.com/docs, read on 2026-11-23: $2 in, $10 out, $0.20 for cache reads."""


STAGES = ("created", "loading", "ssh", "download", "load", "token")
"""Of a box on its way to READY; each has a setting `<stage>_timeout`."""


class Source(IntEnum):
    """Where a value came from; the higher one wins."""

    DEFAULT = 0
    FILE = 1
    ENVIRONMENT = 2
    FLAG = 3


@dataclass(frozen=True)
class Paths:
    """The directories of one profile."""

    config: Path
    state: Path
    cache: Path

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def backends(self) -> Path:
        """The backends that one can choose beside the rented box, see `backends`."""
        return self.config / "backends.toml"

    @property
    def use(self) -> Path:
        """Which of them serve."""
        return self.state / "use.json"

    @property
    def ledger(self) -> Path:
        return self.state / "ledger.sqlite3"

    @property
    def login_key(self) -> Path:
        return self.state / "login_ed25519"

    @property
    def front_token(self) -> Path:
        return self.state / "front.token"

    @property
    def keeper_file(self) -> Path:
        return self.state / "keeper.json"

    @property
    def fleet(self) -> Path:
        return self.state / "fleet.json"

    @property
    def keeper_lock(self) -> Path:
        return self.state / "keeper.lock"

    @property
    def keeper_log(self) -> Path:
        return self.state / "keeper.log"

    @property
    def notice(self) -> Path:
        """What the keeper tells people who are in Claude Code; not there when there is nothing to tell."""
        return self.state / "notice.txt"

    @property
    def notice_for_hooks(self) -> Path:
        """The same as JSON for its hooks."""
        return self.state / "notice.json"

    @property
    def prefixes(self) -> Path:
        """What Claude Code begins its prompts with, see `prefix`."""
        return self.state / "prefixes.json"

    @property
    def cache_key(self) -> Path:
        """What the answers in the cache are sealed with."""
        return self.config / "cache.key"

    @property
    def answers(self) -> Path:
        """The cache of answers, when it is on this machine."""
        return self.state / "answers.sqlite3"

    @property
    def questions(self) -> Path:
        """Those of the semantic cache."""
        return self.state / "questions.sqlite3"

    @property
    def counters(self) -> Path:
        """What the cache did."""
        return self.state / "cache-counters.sqlite3"

    @property
    def archives(self) -> Path:
        """Which files were seen first, see `archive`."""
        return self.state / "archives"

    @property
    def turns(self) -> Path:
        """When the market may be asked again, see `providers.pacing`: one for all profiles."""
        return self.state.parent / "turns.sqlite3"

    @property
    def up_lock(self) -> Path:
        return self.state / "up.lock"

    @property
    def down_lock(self) -> Path:
        return self.state / "down.lock"

    def make(self) -> None:
        """Create the directories, readable by their owner only."""
        for path in (self.config, self.state, self.cache):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _setting(default: Any, help: str, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"help": help, "secret": secret})


@dataclass(frozen=True)
class Settings:
    """Everything a command needs to know, with its source in `sources`."""

    profile: str
    paths: Paths
    sources: Mapping[str, Source] = field(repr=False)

    api_key: str = _setting(
        "", "vast.ai account key, safest in the environment; else the vast CLI's own key file", secret=True
    )
    market_url: str = _setting(LIVE_MARKET, "the market's base URL")
    poll: float = _setting(3.0, "seconds between two questions to the market")
    pace: float = _setting(1.0, "stretches the market's own intervals between two calls; 0 does not keep them")
    listing_lag: float = _setting(60.0, "seconds the market's listing may lag behind a create or a destroy")
    gpu: str = _setting("RTX 4090", "the exact name of the card at the market, such as RTX 3090; a box has one")
    gpu_ram_mb: int = _setting(23_000, "least video memory")
    ram_mb: int = _setting(32_000, "least main memory of the machine")
    reliability: float = _setting(0.98, "least reliability as the market scores it")
    inet_down_mbps: float = _setting(300.0, "least download rate of the machine")
    region: str = _setting("", "only places whose name contains this, e.g. US or Quebec")
    max_price: float | None = _setting(None, "most $/h, disk included")
    disk: float | None = _setting(None, "disk in GB; default: the model's size and room to spare")
    hours: float = _setting(8.0, "the box ends by itself after this many hours")
    max_spend: float = _setting(5.0, "the box ends by itself after this many dollars")
    idle: float = _setting(45.0, "the box ends by itself after this many minutes without a request")
    lease: float = _setting(45.0, "the box ends by itself after this many minutes without our keeper")
    orphan: float = _setting(2.0, "minutes until the keeper ends an unready box whose `up` is gone")
    unguarded: bool = _setting(False, "keep a box whose watchdog could not arm itself")
    attempts: int = _setting(3, "machines to try, one after the other, before giving up")
    created_timeout: float = _setting(5.0, "minutes a rented box may do nothing")
    loading_timeout: float = _setting(15.0, "minutes it may load its image")
    ssh_timeout: float = _setting(5.0, "minutes it may run without letting us in")
    download_timeout: float = _setting(30.0, "minutes the engine and the model may take to come")
    load_timeout: float = _setting(10.0, "minutes the engine may load the model")
    token_timeout: float = _setting(2.0, "minutes the first token may take")
    image: str = _setting(IMAGE, "container image")
    engine: str = _setting("ollama", "what generates tokens: ollama, or llamacpp in the sandbox")
    model: str = _setting("qwen3-coder:30b", "the model to serve")
    registry: str = _setting("", "where ollama pulls models from; default: its own registry")
    ollama_url: str = _setting(
        "https://ollama.com/download/ollama-linux-amd64.tar.zst", "where ollama's release archive comes from"
    )
    ollama_version: str = _setting("0.34.0", "its version; an ollama that the image brings is used from this one on")
    model_url: str = _setting("", "where llamacpp's model file comes from")
    model_sha256: str = _setting("", "its checksum")
    model_bytes: int = _setting(19_000_000_000, "size of the model, when no registry can be asked for it")
    context: int = _setting(65_536, "context window in tokens, of each slot")
    slots: int = _setting(1, "conversations the engine answers at once; each takes the memory of a context")
    kv_cache_type: str = _setting("q8_0", "what the engine keeps of a conversation as: f16, q8_0 or q4_0")
    small_context: bool = _setting(False, "take a context that interactive use of Claude Code does not fit in")
    ssh_config: str = _setting("", "for a machine of one's own: another file than ~/.ssh/config")
    pip_args: str = _setting("", "arguments for pip on the box")
    proxy_requirements: str = _setting(
        "aiohttp==3.14.5 orjson==3.13.0 prometheus-client==0.26.0", "what the proxy on the box is run with"
    )
    engine_requirements: str = _setting("xllamacpp==2026.10.11549", "what llamacpp is installed from")
    port: int = _setting(8001, "the local port Claude Code talks to; the next free one when taken")
    prewarm: bool = _setting(True, "have the box read what Claude Code begins its prompts with before you ask")
    cache_enabled: bool = _setting(True, "keep answers, and give them again to the same request")
    cache_ttl: float = _setting(24.0, "hours an answer is kept")
    cache_ttl_by_class: str = _setting("", "the same for a class of requests, such as auxiliary=168,main=12")
    cache_untempered: bool = _setting(True, "cache requests that do not name a temperature, as all of Claude Code's")
    cache_tempered: bool = _setting(False, "cache those with a temperature above 0 too")
    cache_size: float = _setting(256.0, "MB of answers on this machine; what was not used for longest goes first")
    cache_store: str = _setting("local", "where answers are kept: local, a file of this profile; or redis")
    cache_semantic: str = _setting("off", "similar questions: off; shadow counts what would be served; or on")
    cache_scope: str = _setting("", "whose answers these are; default: this installation's. The same name for a team")
    cache_key: str = _setting(
        "", "what answers are sealed with, 64 hexadecimal digits; default: made at first use", secret=True
    )
    redis_url: str = _setting(
        "",
        "redis://, rediss:// or unix://; default: REDIS_URL, or REDIS_HOST, REDIS_PORT and REDIS_PASSWORD",
        secret=True,
    )
    redis_ca: str = _setting("", "file of the certificates that Redis' one is checked against; default: the system's")
    redis_tls: str = _setting("", "on or off; default: on for every Redis that is not on this machine")
    redis_cluster: bool = _setting(False, "it is a cluster")
    redis_timeout: float = _setting(50.0, "milliseconds a request waits for Redis at most")
    list_price_in: float = _setting(2.0, f"$ per million tokens in that `selfhost cost` compares with; {LIST_PRICE}")
    list_price_cached: float = _setting(0.2, "the same per million tokens that were reused (cache reads)")
    list_price_out: float = _setting(10.0, "the same per million tokens out")
    claude: str = _setting("", "path of the claude command; default: looked for")
    claude_home: str = _setting("", "HOME for claude; default: yours")

    @property
    def sandbox(self) -> bool:
        """The market is a simulated one on this machine, and so are the GPUs it rents out."""
        from urllib.parse import urlsplit

        return urlsplit(self.market_url).hostname in LOOPBACK

    def disk_gb(self, model_bytes: float) -> float:
        """GB to rent: the model twice over (another may be tried), image and engine, at least the market's minimum."""
        return self.disk or max(16.0, round(2 * model_bytes / 1e9 + IMAGE_GB + 10))

    @property
    def ready_timeout(self) -> float:
        """Minutes until a box must be ready, all stages together."""
        return float(sum(getattr(self, f"{stage}_timeout") for stage in STAGES))

    def archive_url(self) -> str:
        """The address that gives exactly this version, as Ollama's own installer asks for it."""
        return f"{self.ollama_url}?version={self.ollama_version}"


NAMES = tuple(f.name for f in fields(Settings) if f.metadata)
DEFAULTS = {f.name: f.default for f in fields(Settings)}
NOT_SETTINGS = ("profile", "paths", "sources")
FLAGS = (
    "api_key",
    "gpu",
    "region",
    "max_price",
    "model",
    "context",
    "slots",
    "kv_cache_type",
    "small_context",
    "engine",
    "disk",
    "hours",
    "max_spend",
    "idle",
    "attempts",
    "port",
    "unguarded",
)
"""The settings that `selfhost up` takes as options."""
POSITIVE = (
    *("hours", "max_spend", "max_price", "idle", "lease", "poll", "port", "context", "slots", "disk", "attempts"),
    *("cache_ttl", "cache_size", "redis_timeout"),
    *(f"{stage}_timeout" for stage in STAGES),
)
"""Zero would end a box at once, or never."""
ONE_OF = {
    "cache_store": ("local", "redis"),
    "cache_semantic": ("off", "shadow", "on"),
    "redis_tls": ("", "on", "off"),
    "kv_cache_type": ("f16", "q8_0", "q4_0"),
}
NAMED = ("model", "engine", "image", "gpu")
URLS = ("market_url", "registry", "ollama_url", "model_url")
OTHER_VARIABLES = ("home", "profile", "cache", "lease_s", "idle_s", "ollama_sha256", "ollama_bytes", "name")
"""SELFHOST_* that are no settings, as far as their names are near one: ours, and those of the parts on a box."""
HIDDEN = "(hidden)"


def paths(profile: str, env: Mapping[str, str]) -> Paths:
    """Where a profile's files live: the platform's own places, XDG_* respected, `SELFHOST_HOME` for all in one."""
    if not profile or not all(c.isalnum() or c in "-_" for c in profile):
        raise UsageError(f"profile name {profile!r}: letters, digits, - and _ only")
    if home := env.get("SELFHOST_HOME"):
        base = Path(home).absolute()
        return Paths(base / "config" / profile, base / "state" / profile, base / "cache")
    import platformdirs

    return Paths(
        platformdirs.user_config_path("selfhost") / profile,
        platformdirs.user_state_path("selfhost") / profile,
        platformdirs.user_cache_path("selfhost"),
    )


def load(profile: str, *, flags: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """Resolve every setting. Raises UsageError naming the key, its source and what would be right."""
    env = os.environ if env is None else env
    where = paths(profile, env)
    values: dict[str, Any] = {}
    sources = dict.fromkeys(NAMES, Source.DEFAULT)
    # In each layer the market comes before its key.
    layers: list[tuple[Source, Mapping[str, object]]] = [
        (Source.FILE, _read_file(where.config_file)),
        (Source.ENVIRONMENT, _read_env(env)),
        (Source.FLAG, {k: v for k, v in (flags or {}).items() if v is not None}),
    ]
    for source, layer in layers:
        for name, value in sorted(layer.items(), key=lambda item: item[0] == "api_key"):
            if name == "api_key" and not _belongs(source, sources["market_url"], values.get("market_url")):
                continue
            values[name] = _cast(name, value, source)
            sources[name] = source
    values["market_url"] = str(values.get("market_url", LIVE_MARKET)).rstrip("/")
    return Settings(profile=profile, paths=where, sources=sources, **values)


def _belongs(key: Source, market: Source, url: object) -> bool:
    """A key is for the market it was set for: one of the environment never goes to a market that a file names."""
    return key is Source.FLAG or key <= market or url in (None, LIVE_MARKET)


def installed(where: Paths) -> bool:
    """Whether this installation has its id: without one no box can carry its label."""
    return (where.config / "installation").exists()


def neighbours(where: Paths) -> list[tuple[str, Paths]]:
    """The profiles beside this one, itself included, that have an id: their boxes are this installation's too."""
    try:
        names = sorted(folder.name for folder in where.config.parent.iterdir())
    except OSError:
        return []
    beside = [(name, Paths(where.config.parent / name, where.state.parent / name, where.cache)) for name in names]
    return [(name, paths) for name, paths in beside if installed(paths)]


def installation_id(where: Paths) -> str:
    """This installation's random id, made at first use; it is in every label."""
    path = where.config / "installation"
    identity = made_once(path, _new_id)
    if len(identity) != 10 or not (identity.isascii() and identity.isalnum()):
        raise UsageError(
            f"{path} does not hold an installation id",
            "It names your boxes at the market. Restore it, or run `selfhost down --all`, then delete the file.",
        )
    return identity


def _new_id() -> str:
    import secrets

    return secrets.token_hex(5)


def made_once(path: Path, make: Callable[[], str]) -> str:
    """The file's text, made if there is none, readable by its owner only."""
    if not path.exists():
        import tempfile

        # Written aside and linked: whoever sees the file sees all of it, and of two writers the first one wins.
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(draft)
    return path.read_text(errors="replace").strip()


def known(name: str) -> str:
    """The name of a setting; `cache.ttl` is `cache_ttl`. Raises UsageError with the nearest one."""
    plain = name.replace(".", "_")
    if plain not in NAMES:
        near = _nearest(plain)
        raise UsageError(
            f"unknown setting {name!r}", f"Did you mean `{near}`?" if near else "`selfhost config show` lists them."
        )
    return plain


def public(name: str, value: object) -> object:
    """What may be shown of a value: nothing of a secret, no name and password in a URL."""
    if _secret(name):
        return HIDDEN if value else ""
    if not isinstance(value, str) or "@" not in value:
        return value
    import re

    return re.sub(r"(?<=://)\S+(?=@)", HIDDEN, value)


def _secret(name: str) -> bool:
    return next(bool(f.metadata["secret"]) for f in fields(Settings) if f.name == name)


def write(where: Paths, name: str, text: str) -> object:
    """Set one key of config.toml; all else in it stays as it is. Returns what was set, as the setting's type.

    The file appears whole, readable by its owner only; a link is followed. Raises UsageError, before anything is
    written, for what no setting is, what it cannot be, and a file that is no TOML.
    """
    name = known(name)
    value = _cast(name, text, Source.FILE)
    _edit(where, name, value)
    return value


def unset(where: Paths, name: str) -> bool:
    """Take one key out of config.toml, as `write` puts one in; whether it was there. Raises UsageError like that."""
    name = known(name)
    if name not in _read_file(where.config_file):
        return False
    _edit(where, name, None)
    return True


def _edit(where: Paths, name: str, value: Any) -> None:
    """With None the key is taken out: no value of TOML is that."""
    import tempfile
    import tomllib

    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    path = where.config_file.resolve()
    try:
        document = tomlkit.parse(path.read_bytes().decode() if path.exists() else "")
        table, key = _place(document, name)
        if value is None:
            table.remove(key)
        else:
            table[key] = int(value) if isinstance(value, float) and value.is_integer() else value
        edited = tomlkit.dumps(document)
        held = _flat(tomllib.loads(edited))
    except (OSError, ValueError, TOMLKitError) as error:
        raise UsageError(f"{path}: {error}", "Mend the file; nothing was written.") from error
    if held.get(name) != value:
        raise UsageError(f"{path}: {name!r} cannot be changed in it", "Do that by hand; nothing was written.")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".config-")  # 0600 from its first byte
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(edited.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _place(document: Any, name: str) -> tuple[Any, str]:
    """Where a setting stands, or is to stand: in a table, if there is one for it, else by its whole name."""
    for table in (key for key, value in document.items() if isinstance(value, dict)):
        if name.startswith(f"{table}_") and name not in document:
            return document[table], name.removeprefix(f"{table}_")
    return document, name


def _nearest(name: str, cutoff: float = 0.6) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), NAMES, n=1, cutoff=cutoff)), "")


def _read_file(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
        import tomllib

        return _flat(tomllib.loads(text))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}", "Mend the file; nothing was done.") from error


def _flat(held: Mapping[str, Any]) -> dict[str, object]:
    """A table's keys by the names of settings: `untempered` in [cache] is `cache_untempered`. Raises ValueError."""
    flat: dict[str, object] = {}
    for name, value in held.items():
        inner = {f"{name}_{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        if twice := flat.keys() & inner.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is set twice")
        flat |= inner
    return flat


def _read_env(env: Mapping[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in NAMES:
        value = env.get(f"SELFHOST_{name.upper()}")
        if value:
            found[name] = value
    for variable in env:
        name = variable.removeprefix("SELFHOST_").lower()
        if not variable.startswith("SELFHOST_") or name in NAMES or name in OTHER_VARIABLES:
            continue
        if near := _nearest(name, cutoff=0.8):
            raise UsageError(f"unknown setting {variable} (environment)", f"Did you mean SELFHOST_{near.upper()}?")
    if "api_key" not in found and "market_url" not in found and env.get("VAST_API_KEY"):
        found["api_key"] = env["VAST_API_KEY"]
    return found


def _cast(name: str, value: object, source: Source) -> object:
    if name not in NAMES:
        near = _nearest(name)
        hint = f" Did you mean {near!r}?" if near else ""
        raise UsageError(f"unknown setting {name!r} ({source.name.lower()}).{hint}")
    kind = next(str(f.type) for f in fields(Settings) if f.name == name)
    try:
        return _convert(name, kind, value)
    except (TypeError, ValueError) as error:
        shown = HIDDEN if _secret(name) else repr(public(name, value))
        variable = f"SELFHOST_{name.upper()}{' or VAST_API_KEY' if name == 'api_key' else ''}"
        remedy = f"Mend or unset {variable}." if source is Source.ENVIRONMENT else ""
        raise UsageError(f"{name} = {shown} ({source.name.lower()}): {error}", remedy) from error


def _convert(name: str, kind: str, value: object) -> object:
    if kind == "bool":
        return _boolean(value)
    if kind == "str":
        if not isinstance(value, str):
            raise ValueError("expected text")
        return _text(name, value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("expected a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("expected a number") from None
    if name == "port" and number > 65_535:
        raise ValueError("expected a port, 1 to 65535")
    if name in POSITIVE and number == 0:
        raise ValueError("expected more than zero")
    if not 0 <= number < float("inf"):
        raise ValueError("expected a number, zero or more")
    if kind != "int":
        return number
    if number != int(number):
        raise ValueError("expected a whole number")
    return int(number)


def _text(name: str, value: str) -> str:
    value = value.strip()
    if name == "api_key" and not (value.isascii() and value.isprintable()):
        raise ValueError("expected printable ASCII characters")
    if name in NAMED and not value:
        raise ValueError("expected a name")
    if name == "model":
        # The parts of a name that are Ollama's defaults: it lists the model without them.
        return value.removeprefix("registry.ollama.ai/").removeprefix("library/")
    if name in ONE_OF and value not in ONE_OF[name]:
        raise ValueError(f"expected {' or '.join(one or 'nothing' for one in ONE_OF[name])}")
    if name == "cache_key" and value and not (len(value) == 64 and set(value) <= set("0123456789abcdef")):
        raise ValueError("expected 64 hexadecimal digits, as `selfhost cache key` prints them")
    if name == "cache_scope" and not (
        len(value) <= 64 and all(c.isascii() and (c.isalnum() or c in "._-") for c in value)
    ):
        raise ValueError("expected at most 64 letters, digits, dots, - and _")
    if name == "cache_ttl_by_class":
        lifetimes(value)
    if name in URLS and value != DEFAULTS[name]:
        from urllib.parse import urlsplit

        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"expected a URL such as {LIVE_MARKET}")
        if name == "registry" and url.scheme == "http" and url.hostname not in LOOPBACK:
            raise ValueError("expected https, or http on loopback")
    return value


def lifetimes(text: str) -> dict[str, float]:
    """Hours by class of request, from such as "auxiliary=168,main=12". Raises ValueError."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, hours = part.partition("=")
        try:
            found[name.strip()] = float(hours)
        except ValueError:
            raise ValueError("expected such as auxiliary=168,main=12, in hours") from None
        if not 0 < found[name.strip()] < float("inf"):
            raise ValueError(f"expected more than zero hours for {name.strip()}")
    return found


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {
        "1": True,
        "true": True,
        "on": True,
        "yes": True,
        "0": False,
        "false": False,
        "off": False,
        "no": False,
    }
    try:
        return words[str(value).lower()]
    except KeyError:
        raise ValueError("expected true or false") from None


assert all(f.default is not MISSING for f in fields(Settings) if f.name not in NOT_SETTINGS)
