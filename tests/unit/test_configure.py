"""`selfhost config`: what is shown, and what is written where."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.cli import app, configure
from selfhost_cli.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
FILE = """\
# ours
hours = 8   # a working day

region = 'US'  # near
api_key = "k-of-the-account"
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("SELFHOST_") or name == "VAST_API_KEY":
            monkeypatch.delenv(name)
    monkeypatch.setenv("SELFHOST_HOME", str(tmp_path))
    return config.paths("default", os.environ).config_file


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def selfhost(*words: str) -> tuple[str, str]:
        assert app.run(["config", *words]) == 0
        said = capsys.readouterr()
        return said.out, said.err

    return selfhost


def write(path: Path, text: str = FILE, mode: int = 0o600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


Run = Callable[..., tuple[str, str]]


def test_setting_one_keeps_comments_and_all_other_lines(path: Path, run: Run) -> None:
    write(path)
    run("set", "hours", "3")
    assert path.read_text() == FILE.replace("hours = 8 ", "hours = 3 ")
    run("set", "model", "qwen3:8b")
    assert path.read_text() == FILE.replace("hours = 8 ", "hours = 3 ") + 'model = "qwen3:8b"\n'
    assert config.load("default").model == "qwen3:8b"


def test_taking_one_out_keeps_comments_and_all_other_lines_and_the_default_holds(path: Path, run: Run) -> None:
    assert run("unset", "hours") == ("", f"selfhost: hours is not in {path}\n")
    assert not path.exists(), "nothing to take out, nothing to write"
    write(path)
    assert run("unset", "region") == ("", f"selfhost: region is no more in {path}\n")
    assert path.read_text() == FILE.replace("region = 'US'  # near\n", "")
    assert config.load("default").region == ""
    run("unset", "api_key")
    assert path.read_text() == "# ours\nhours = 8   # a working day\n\n"


def test_taking_one_out_that_the_environment_sets_says_so(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path)
    monkeypatch.setenv("SELFHOST_HOURS", "3")
    assert "SELFHOST_HOURS is set in the environment" in run("unset", "hours")[1]


def test_what_no_setting_is_or_what_is_no_toml_cannot_be_taken_out(path: Path, run: Run) -> None:
    with pytest.raises(UsageError, match="unknown setting 'hour'"):
        run("unset", "hour")
    write(path, "hours = [")
    with pytest.raises(UsageError, match=r"config\.toml"):
        run("unset", "hours")
    assert path.read_text() == "hours = ["


@pytest.mark.parametrize("text", ["hours = 1", "# a comment without an end", "hours = 1\r\nregion = 'US'\r\n", ""])
def test_whatever_the_file_looked_like_the_new_key_is_read_back(path: Path, run: Run, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode())
    run("set", "max_price", "0.5")
    assert path.read_bytes().startswith(text.encode())
    assert config.load("default").max_price == 0.5


def test_the_file_is_made_for_its_owner_only_and_an_open_one_is_closed(path: Path, run: Run) -> None:
    run("set", "gpu", "RTX 5090")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ('gpu = "RTX 5090"\n', 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    run("set", "unguarded", "yes")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert config.load("default").unguarded
    assert [one.name for one in path.parent.iterdir()] == ["config.toml"]


def test_a_link_stays_one(path: Path, run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "dotfiles.toml"
    kept.write_text("hours = 1\n")
    path.parent.mkdir(parents=True)
    path.symlink_to(kept)
    run("set", "hours", "2")
    assert path.is_symlink()
    assert kept.read_text() == "hours = 2\n"


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (("hour", "3"), "unknown setting 'hour'", "Did you mean `hours`?"),
        (("max-price", "3"), "unknown setting 'max-price'", "Did you mean `max_price`?"),
        (("zzz", "3"), "unknown setting 'zzz'", "`selfhost config show` lists them."),
        (("hours", "soon"), "hours = 'soon' (file): expected a number", ""),
        (("port", "70000"), "expected a port", ""),
        (("api_key", "two\nlines"), "api_key = (hidden)", ""),
        (("model_url", "ftp://me:pw-of-mine@example.org/x"), "model_url = 'ftp://(hidden)@example.org/x'", ""),
    ],
)
def test_nothing_is_written_for_what_makes_no_sense(
    path: Path, run: Run, words: tuple[str, str], message: str, remedy: str
) -> None:
    write(path)
    with pytest.raises(UsageError) as caught:
        run("set", *words)
    assert message in caught.value.message
    assert caught.value.remedy == remedy
    assert path.read_text() == FILE


@pytest.mark.parametrize("text", ["hours = [", "\xff"])
def test_a_file_that_cannot_be_edited_stays_as_it_is(path: Path, run: Run, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"config\.toml"):
        run("set", "model", "x")
    assert path.read_bytes() == text.encode("latin-1")


def test_a_failed_write_leaves_the_old_file_alone(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run("set", "hours", "3")
    assert path.read_text() == FILE
    assert [one.name for one in path.parent.iterdir()] == ["config.toml"]


def test_a_secret_can_be_piped_in_and_is_never_told(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("hunter2hunter2\n")
    with (tmp_path / "key").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        told = run("set", "api_key")
    assert path.read_text() == 'api_key = "hunter2hunter2"\n'
    told += run("show") + run("show", "--json") + run("get", "api_key", "--json")
    assert "hunter2" not in "".join(told)
    with pytest.raises(UsageError, match=r"api_key is a secret and is not printed; it is set \(file\)"):
        run("get", "api_key")


@pytest.mark.parametrize("entered", ["", "\n", "  \n"])
def test_a_secret_that_was_not_entered_leaves_the_stored_one(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, entered: str
) -> None:
    write(path, 'api_key = "stored"\n')
    monkeypatch.setattr("sys.stdin", io.StringIO(entered))
    with pytest.raises(UsageError, match="nothing was entered") as caught:
        run("set", "api_key")
    assert "`selfhost config unset api_key`" in caught.value.remedy
    assert path.read_text() == 'api_key = "stored"\n'


def test_enter_at_the_prompt_leaves_the_stored_one(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 'api_key = "stored"\n')
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: "")
    with pytest.raises(UsageError, match="nothing was entered"):
        run("set", "api_key")
    assert path.read_text() == 'api_key = "stored"\n'


@pytest.mark.parametrize("name", ["model", "gpu", "image", "engine"])
def test_what_has_to_be_named_is_not_set_to_nothing(path: Path, run: Run, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} = .*expected a name"):
        run("set", name, " ")
    assert not path.exists()


def test_each_setting_is_shown_with_value_source_and_help(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path)
    monkeypatch.setenv("SELFHOST_REGION", "CA")
    monkeypatch.setenv("SELFHOST_PIP_ARGS", "--index-url https://me:pw-of-mine@example.org/simple")
    shown = json.loads(run("show", "--json")[0])
    rows = {one["name"]: one for one in shown["settings"]}
    assert set(rows) == set(config.NAMES)
    assert shown["file"] == str(path)
    found = [(rows[name]["value"], rows[name]["source"]) for name in ("hours", "region", "gpu", "api_key", "pip_args")]
    assert found == [
        (8.0, "file"), ("CA", "environment"), ("RTX 4090", "default"), ("(hidden)", "file"),
        ("--index-url https://(hidden)@example.org/simple", "environment"),
    ]  # fmt: skip
    text = run("show")[0]
    assert f"profile default, {path}\n" in text
    assert "hours = 8  file\n    the box ends by itself after this many hours\n" in text
    assert "pw-of-mine" not in text
    assert max(map(len, text.splitlines()[1:])) <= 120


def test_get_prints_what_holds_and_set_says_what_beats_it(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFHOST_HOURS", "2.5")
    _, err = run("set", "hours", "3")
    assert f"hours = 3 in {path}" in err
    assert "SELFHOST_HOURS is set in the environment, which beats the file" in err
    assert run("get", "hours")[0] == "2.5\n"
    assert run("get", "max_price")[0] == "\n"
    assert run("get", "unguarded")[0] == "false\n"
    assert run("get", "list_price_in")[0] == "2\n"


def test_the_page_can_be_typed_line_by_line(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert {words[2] for words in lines} == {"show", "get", "set", "unset", "path"}
    monkeypatch.setattr("sys.stdin", io.StringIO("the-key-of-the-account\n"))
    for words in lines:
        assert words[:2] == ["selfhost", "config"]
        run(*words[2:])
    settings = config.load("default")
    assert (settings.max_price, settings.api_key) == (None, "the-key-of-the-account"), "set, and taken out again"


def test_path_tells_where_the_file_is_however_broken(path: Path, run: Run) -> None:
    write(path, "hours = [")
    assert run("path")[0] == f"{path}\n"


def test_the_old_systems_variables_are_listed_where_they_are_set(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("CACHE_TTL=60\n")
    monkeypatch.setenv("REDIS_PASSWORD", "pw-of-mine")
    text, _ = run("show")
    assert "REDIS_PASSWORD (environment): used at choice" in text
    assert ".env (working directory): ignored" in text
    assert "pw-of-mine" not in text
    found = json.loads(run("show", "--json")[0])["old_variables"]
    assert {one["variable"]["name"]: one["where"] for one in found}["REDIS_PASSWORD"] == "environment"


def test_a_float_is_written_as_short_as_it_was_meant() -> None:
    assert [configure._written(one) for one in (2.0, 0.98, 1234567.5, True, None, "x")] == [
        "2", "0.98", "1234567.5", "true", "", "x",
    ]  # fmt: skip
