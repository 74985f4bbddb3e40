"""What must not be in a report: the secrets that we know, and whatever looks like one that we do not.

Hides rather too much: a checksum is as random as a key.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from selfhost_cli.config import Paths
from selfhost_cli.errors import plain

HIDDEN = "(hidden)"
PIECE = 8
"""Characters: so much of a long secret is hidden wherever it stands, because others cut their lines."""
LONG = 16
SHORTEST = 4
NAMED = re.compile(r"(?i)(KEY|TOKEN|SECRET|PASS(WORD|WD|PHRASE)?|_PWD|CREDENTIALS?|COOKIE|AUTH)$")
"""Variables of the environment that hold one."""
LEAST_OF_NAMED = 6
"""Characters: a shorter one is "true", or a number."""
NAME = (
    r"(?:(?:api|access|account|private)[_-]?key|(?-i:(?<=[A-Z0-9])_(?:KEY|PWD|AUTH))|secret|credentials?"
    r"|(?<![a-z])pass|passw(?:or)?d|passphrase)"
)
"""What stands in front of one."""
VALUE = r"""(?P<value>(?!…)(?:(?<=")[^"\n]+|(?<=')[^'\n]+|[^\s"'&]+))"""
"""Behind a quote all until the next one: there may be blanks in it."""
SHAPES = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=://)\S+(?=@)"),
    # Without a scheme. Bounded, because a stranger writes the lines; of images, what follows the "@" is a checksum.
    re.compile(r"""[^\s:@="'(,;]{1,64}:(?!//)\S{1,200}(?=@(?!sha256:)[\w\[])"""),
    re.compile(r"(?i)(?<=\bbearer )\s*\S+|(?<=\bbasic )\s*[\w+/=-]{6,}"),
    # Of these headers the rest of the line: a scheme and a word, or several pairs.
    re.compile(r"""(?i)(?:authorization|cookie)\\*["']?\s*[=:]\s*(?P<value>[^\n]+)"""),
    re.compile(rf"""(?i){NAME}\\*["']?\s*[=:]\s*\\*["']?{VALUE}"""),
    # In a model's vocabulary a token is a number.
    re.compile(rf"""(?i)token\\*["']?\s*[=:]\s*\\*["']?(?!\d{{1,6}}(?![\w.-])){VALUE}"""),
    re.compile(rf"""(?i)--[\w-]{{0,64}}(?:key|token|secret|pass(?:w(?:or)?d|phrase)?|auth)[\s=]+["']?{VALUE}"""),
    re.compile(r"""(?i)(?<!\S)(?:-[a-z]{0,9}u|--(?:proxy-)?user)[\s=]*["']?(?P<value>[^\s:"']+:[^\s"']+)"""),
    re.compile(r"\b(?:sk-|hf_|gh[pousr]_|glpat-|xox[a-z]-|AKIA|AIza|eyJ)[\w.-]{8,}"),
)
KEY_IN_CONFIG = re.compile(r"""api_key\s*=\s*["']*([^"'\s#]+)""")
HEX = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{32,}(?![0-9A-Za-z])")
MIXED = re.compile(r"[A-Za-z0-9+/_-]{20,}={0,2}")
WORD = re.compile("([A-Z]?[a-z]*|[A-Z]+)[0-9]*[A-Za-z]{0,2}={0,2}")
"""In names such as Coder-30B-A3B or x86_64: no random text is made of nothing else."""
KINDS = tuple(map(re.compile, ("[a-z]", "[A-Z]", "[0-9]")))
BITS_OF_HEX, BITS_OF_MIXED, BITS_OF_LETTERS = 2.0, 3.6, 4.2
"""Per character, by Shannon's measure: 20 random characters of base64 have about 4.1."""


class Secrets:
    """Hides `values`, all that has the shape of a secret, and the name of the user in paths."""

    def __init__(self, values: Iterable[str], env: Mapping[str, str]) -> None:
        whole = {value for value in values if len(value) >= SHORTEST}
        self._short = sorted((value for value in whole if len(value) < LONG), key=len, reverse=True)
        forms = {form for value in whole if len(value) >= LONG for form in _forms(value)}
        self._pieces = {form[at : at + PIECE] for form in forms for at in range(len(form) - PIECE + 1)}
        home = env.get("HOME", "").rstrip("/")
        self._home = re.compile(rf"{re.escape(home)}(?![\w-]|\.\w)") if len(home) > 1 else None

    def hide(self, text: str) -> str:
        text = self._without_pieces(plain(text))
        for value in self._short:
            text = text.replace(value, HIDDEN)
        for shape in SHAPES:
            text = shape.sub(_hidden, text)
        text = HEX.sub(lambda found: HIDDEN if _bits(found[0].lower()) > BITS_OF_HEX else found[0], text)
        text = MIXED.sub(lambda found: HIDDEN if _random(found[0]) else found[0], text)
        return self._home.sub("~", text) if self._home else text

    def _without_pieces(self, text: str) -> str:
        secret = bytearray(len(text))
        for at in range(len(text) - PIECE + 1):
            if text[at : at + PIECE] in self._pieces:
                secret[at : at + PIECE] = b"\1" * PIECE
        parts, at = [], 0
        for run in re.finditer(b"\1+", bytes(secret)):
            parts += [text[at : run.start()], HIDDEN]
            at = run.end()
        return "".join([*parts, text[at:]])


def known(paths: Paths, env: Mapping[str, str], account_key: str, box_tokens: Iterable[str]) -> Iterator[str]:
    """Every secret of this profile and of the environment, as far as it can be read."""
    yield account_key
    yield from box_tokens
    home = Path(env.get("HOME") or Path.home())
    stored = Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "vastai" / "vast_api_key"
    yield from KEY_IN_CONFIG.findall("\n".join(_lines(paths.config_file)))  # it may not be readable as TOML
    for path in (paths.front_token, paths.login_key, stored, home / ".vast_api_key"):
        yield from _lines(path)
    for name, value in env.items():
        if NAMED.search(name) and not value.startswith("/") and len(value) >= LEAST_OF_NAMED:
            yield value
        proxy = name.lower().endswith("_proxy")  # needs no scheme
        for word in value.split() if "@" in value and (proxy or "://" in value) else ():
            yield from _of_url(word if "://" in word or not proxy else f"//{word}")


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    yield from (line.strip() for line in text.splitlines() if not line.startswith("-----"))


def _of_url(text: str) -> Iterator[str]:
    """What a URL says in front of its host: as it stands, decoded, and as a header would have it."""
    try:
        login = urlsplit(text).netloc.rpartition("@")[0]
    except ValueError:
        return
    password = login.partition(":")[2]
    yield from (login, password, unquote(password))
    yield base64.b64encode(unquote(login).encode()).decode()


def _forms(value: str) -> Iterator[str]:
    """As it is, as in a URL, hexadecimal, and in base64 wherever in a text it may begin."""
    data = value.encode()
    yield from (value, quote(value, safe=""), data.hex())
    for shift, cut in ((0, 0), (1, 2), (2, 3)):
        whole = base64.b64encode(b"\0" * shift + data)[cut : (shift + len(data)) * 8 // 6].decode()
        yield from (whole, whole.replace("+", "-").replace("/", "_"))


def _hidden(found: re.Match[str]) -> str:
    if "value" not in found.re.groupindex:
        return HIDDEN
    return found[0][: found.start("value") - found.start()] + HIDDEN


def _random(text: str) -> bool:
    """Whether it is, or any part of it, as of a path."""
    return any(_random_part(part) for part in (text, *text.split("/")))


def _random_part(text: str) -> bool:
    if len(text) < 20 or all(WORD.fullmatch(word) for word in re.split("[-_+/]", text)):
        return False
    if len(text) >= 24 and text.isalnum() and sum(map(str.isdigit, text)) >= 3:
        return True
    small, large, digits = (bool(kind.search(text)) for kind in KINDS)
    least = BITS_OF_MIXED if digits else BITS_OF_LETTERS
    return small and large and (digits or len(text) >= 32) and _bits(text) > least


def _bits(text: str) -> float:
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
