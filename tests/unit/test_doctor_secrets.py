"""What `doctor` hides: secrets that it knows, however they are written or cut, and what has the shape of one."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from selfhost_cli import config
from selfhost_cli.doctor.secrets import HIDDEN, Secrets, known
from selfhost_cli.remote.ssh import make_key

KNOWN = secrets.token_urlsafe(32)
FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda value: value,
    "in a word": lambda value: f"xx{value}yy",
    "its beginning": lambda value: value[:14] + "...",
    "its end": lambda value: "..." + value[-14:],
    "hex": lambda value: value.encode().hex(),
    "base64": lambda value: base64.b64encode(b"user:" + value.encode()).decode(),
    "quoted": lambda value: quote(value, safe=""),
    "json": lambda value: json.dumps({"text": value}),
    "over a control character": lambda value: value[:20] + "\x1b" + value[20:],
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_known_secret_is_hidden_however_it_is_written(form: str) -> None:
    text = Secrets([KNOWN], {}).hide(f"before {FORMS[form](KNOWN)} after")
    assert not any(KNOWN[at : at + 8] in text for at in range(len(KNOWN) - 7))
    assert KNOWN.encode().hex()[:16] not in text
    assert base64.b64encode(b"user:" + KNOWN.encode()).decode()[8:24] not in text
    assert text.startswith("before ")
    assert text.endswith(" after")


def test_a_short_password_is_hidden_wherever_it_stands() -> None:
    assert Secrets(["hunter2"], {}).hide("proxy says: hunter2 is wrong") == f"proxy says: {HIDDEN} is wrong"


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer {}",
        "authorization: Basic {}",
        "proxy http://user:{}@host:3128/ refused",
        "proxy http://{}@host:3128/ refused",
        "https://user:pa@ss{}@host/simple",
        '{{"api_key": "{}"}}',
        "OPENAI_API_KEY={} ollama serve",
        "password = '{}'",
        "?token={}&x=1",
        "key sk-ant-{} was refused",
        "using hf_{}",
        "https_proxy=jane:{}@proxy:3128",
        "proxy jane:{}@proxy refused",
        "proxy jane:a/b@{}@[::1]:3128 refused",
        "Cookie: session={}",
        "Set-Cookie: a=b; session={}; Path=/",
        "Authorization: Token {}",
        'Authorization: Digest username="jane", response="{}"',
        "PASSPHRASE={}",
        "pass={}",
        "DB_PASS={}",
        "MYSQL_PWD={}",
        "HF_KEY={}",
        "AWS_SECRET_ACCESS_KEY={}",
        "password=first,{}",
        "password = 'let me {} in'",
        "serve --token {} --verbose",
        "serve --api-key {}",
        "serve --api-key='{}'",
        "curl -u jane:{} https://host/",
        "curl -sSu 'jane:{}' https://host/",
        "curl --proxy-user jane:{} https://host/",
        '{{"body": "{{\\"token\\": \\"{}\\"}}"}}',
    ],
)
@pytest.mark.parametrize("value", ["letmein", "a1B2c3D4e5", secrets.token_hex(32)], ids=["word", "mixed", "hex"])
def test_what_has_the_shape_of_a_secret_is_hidden(text: str, value: str) -> None:
    if "sk-ant" in text or "hf_" in text:
        value += "-longer"
    hidden = Secrets([], {}).hide(text.format(value))
    assert value not in hidden
    assert HIDDEN in hidden


@pytest.mark.parametrize("make", [lambda: secrets.token_hex(32), lambda: secrets.token_urlsafe(32)], ids=["hex", "url"])
def test_an_unknown_random_string_is_hidden(make: Callable[[], str]) -> None:
    for _ in range(200):
        value = make()
        assert value not in Secrets([], {}).hide(f"loaded {value} from there")


def test_a_private_key_is_hidden_whole_or_cut() -> None:
    private, public = make_key("x")
    body = private.splitlines()[1]
    for text in (private, private[: len(private) // 2], private.replace("\n", "\\n")):
        hidden = Secrets([], {}).hide(f"read\n{text}")
        assert not any(body[at : at + 8] in hidden for at in range(len(body) - 7))
    assert public.split()[1] not in Secrets([], {}).hide(public)


@pytest.mark.parametrize(
    "text",
    [
        "Linux-6.18.44-fc-v595-x86_64-with-glibc2.36",
        f"model=hf.co/unsloth/{'-'.join(['Qwen3', 'Coder', '30B', 'A3B', 'Instruct', 'GGUF'])}:Q4_K_M (environment)",
        "box 54815134 (RTX 4090, $0.31/h) is ready",
        "2026-11-23 17:00:01 start.sh: engine ended with status 137, again in 4 s",
        "image=vastai/base-image:cuda-12.8.1-cudnn-devel-ubuntu24.04-py312 (file)",
        "id=req_01 status=200 input_tokens=512 output_tokens=33",
        'put it into config.toml (api_key = "…").',
        "llama_model_loader: - kv 12: general.quantization_version u32 = 2",
        "print_info: EOS token        = 151645 '<|im_end|>'",
        "serve --max-tokens 4096",
        "pull vastai/base-image:cuda@sha256:0123 for root@10.0.0.1:22",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert Secrets([KNOWN], {"HOME": "/"}).hide(text) == text


def test_the_home_directory_does_not_tell_the_users_name() -> None:
    hide = Secrets([], {"HOME": "/home/jane"}).hide
    assert hide("/home/jane/bin/claude") == "~/bin/claude"
    assert hide("it is in /home/jane.") == "it is in ~."
    assert hide("/home/janet/x and /home/jane-2") == "/home/janet/x and /home/jane-2"


@pytest.mark.parametrize("name", ["https_proxy", "ALL_PROXY"])
def test_a_proxys_password_is_known_without_a_scheme_too(name: str, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), name: "jane:let%40in@proxy:3128"}
    found = set(known(config.paths("default", env), env, "", []))
    assert {"jane:let%40in", "let%40in", "let@in"} <= found


def test_a_long_line_of_a_stranger_does_not_hold_a_report_up() -> None:
    began = time.process_time()
    for text in ("a:" * 4000, "=a:a" * 2000, "a" * 8000, "--" * 4000, "-u " * 2700, "token=" * 1300):
        Secrets([], {}).hide(text)
    assert time.process_time() - began < 10


def test_every_place_where_we_keep_one_is_read(tmp_path: Path) -> None:
    where = config.paths("default", {"SELFHOST_HOME": str(tmp_path / "s")})
    where.make()
    private, _ = make_key("login")
    where.login_key.write_text(private)
    where.front_token.write_text("the-front-token\n")
    where.config_file.write_text("this is no TOML\napi_key = 'the-key-in-it'\n")
    (tmp_path / ".vast_api_key").write_text("vasts-own-key")
    (tmp_path / ".config/vastai").mkdir(parents=True)
    (tmp_path / ".config/vastai/vast_api_key").write_text("vasts-newer-key")
    env = {"HOME": str(tmp_path), "MY_TOKEN": "of-the-shell", "SSH_KEY": "/a/path", "https_proxy": "http://me:p%40ss@h"}
    found = set(known(where, env, "account", ["box"]))
    assert {"account", "box", "the-front-token", "the-key-in-it", "vasts-own-key", "vasts-newer-key"} <= found
    assert {"of-the-shell", "me:p%40ss", "p%40ss", "p@ss", *private.splitlines()[1:-1]} <= found
    assert "/a/path" not in found
