"""The laptop's half of the installation, on a box that is a local directory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfhost_cli import countdown, install, payload
from selfhost_cli.archive import Archive
from selfhost_cli.errors import NotServable, SelfhostError
from selfhost_cli.install import InstallSpec
from selfhost_cli.model import Event
from selfhost_cli.remote import ConnectionLost
from tests.fakes.remote import RemoteFake
from tests.templates.box import Box, Files, stub_proxy_zip

SPEC = InstallSpec(
    engine="llamacpp", model="tiny", context=4096, token="secret token", version="1", proxy_requirements=""
)


@pytest.fixture
def mirror() -> Iterator[Files]:
    server = Files({"/m/tiny.gguf": b"weights"})
    yield server
    server.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path / "box")
    yield made
    made.kill_all()


@pytest.fixture
def remote(box: Box) -> RemoteFake:
    return RemoteFake(box.home, box.env)


@pytest.fixture
def wanted(box: Box, mirror: Files, tmp_path: Path) -> dict[str, tuple[bytes, int]]:
    """The files of a spec, with stand-ins for the two that would need a real engine."""
    stubs = Box(tmp_path / "stubs")
    stubs.put_parts()
    spec = dataclasses.replace(SPEC, url=f"{mirror.url}/m/tiny.gguf")
    wanted = {f"bin/{name}": (payload.script(name), 0o700) for name in ("install.sh", "start.sh", "stop.sh")}
    return {
        **wanted,
        "bin/llamacpp.py": ((stubs.dir / "bin/llamacpp.py").read_bytes(), 0o700),
        "bin/proxy.zip": (stub_proxy_zip(), 0o600),
        "run/install.env": (install.env_file(spec), 0o600),
    }


def test_it_uploads_installs_and_says_the_port(
    box: Box, remote: RemoteFake, wanted: dict[str, tuple[bytes, int]]
) -> None:
    events: list[Event] = []
    installed = install.bring(remote, wanted, events.append)
    assert installed.proxy_port == int(box.text("run/proxy.port"))
    ended = [event.stage for event in events if event.status == "done"]
    assert sorted(ended[2:-1]) == ["engine", "model", "proxy"]  # side by side
    assert (ended[:2], ended[-1]) == (["upload", "tools"], "start")
    modes = {path: (box.dir / path).stat().st_mode & 0o777 for path in wanted}
    assert modes == {path: mode for path, (_, mode) in wanted.items()}
    assert box.dir.stat().st_mode & 0o777 == 0o700


def test_a_second_time_uploads_nothing_and_a_change_uploads_that_file(
    remote: RemoteFake, wanted: dict[str, tuple[bytes, int]]
) -> None:
    install.bring(remote, wanted, lambda event: None)
    remote.puts.clear()
    events: list[Event] = []
    install.bring(remote, wanted, events.append)
    assert remote.puts == []
    assert {event.status for event in events} == {"skip"}
    changed = {**wanted, "bin/stop.sh": (wanted["bin/stop.sh"][0] + b"# new\n", 0o700)}
    install.bring(remote, changed, lambda event: None)
    assert remote.puts == [".selfhost/bin/stop.sh"]


def test_a_failing_step_is_the_message_with_its_last_lines_and_the_way_on(
    box: Box, remote: RemoteFake, wanted: dict[str, tuple[bytes, int]]
) -> None:
    (box.tools / "curl").unlink()
    events: list[Event] = []
    with pytest.raises(SelfhostError) as caught:
        install.bring(remote, wanted, events.append)
    assert caught.value.message.startswith("installing on the box failed at the step tools: missing on this box: curl")
    assert "the end of ~/.selfhost/log/install.log" in caught.value.message
    assert "selfhost down" in caught.value.remedy
    assert "selfhost up" in caught.value.remedy
    assert events[-1].status == "fail"
    assert "secret token" not in caught.value.message


def test_what_no_other_box_could_do_is_an_error_of_its_own(
    remote: RemoteFake, wanted: dict[str, tuple[bytes, int]]
) -> None:
    line = r"@selfhost\tmodel\trefuse\t\t\tthe registry has no model"
    refusing = {**wanted, "bin/install.sh": (f"printf '{line}\\n'; exit 1\n".encode(), 0o700)}
    with pytest.raises(NotServable, match="at the step model: the registry has no model"):
        install.bring(remote, refusing, lambda event: None)


def test_a_script_that_dies_without_a_word_is_an_error_too(
    remote: RemoteFake, wanted: dict[str, tuple[bytes, int]]
) -> None:
    broken = {**wanted, "bin/install.sh": (b"echo noise; echo 'disk on fire' >&2; exit 7\n", 0o700)}
    with pytest.raises(SelfhostError, match="status 7\n    disk on fire"):
        install.bring(remote, broken, lambda event: None)


def test_a_lost_connection_stays_one(remote: RemoteFake) -> None:
    remote.close()
    with pytest.raises(ConnectionLost):
        install.bring(remote, {}, lambda event: None)


def test_a_home_that_cannot_be_written_is_an_error(box: Box, remote: RemoteFake) -> None:
    (box.home / ".selfhost").write_text("in the way")
    with pytest.raises(SelfhostError, match="cannot be used"):
        install.bring(remote, {"bin/x": (b"", 0o600)}, lambda event: None)


def test_the_files_of_a_spec_are_the_shipped_ones() -> None:
    files = install.files(SPEC)
    assert set(files) == {
        "bin/install.sh", "bin/start.sh", "bin/stop.sh", "bin/limits.sh", "bin/hostkey.sh", "bin/llamacpp.py",
        "bin/ollama.py", "bin/proxy.zip", "run/install.env",
    }  # fmt: skip
    assert files["bin/install.sh"] == (payload.script("install.sh"), 0o700)
    assert files["run/install.env"][1] == 0o600


def test_what_the_archive_was_is_told_once_it_is_known() -> None:
    seen = Archive(1900, "ab" * 32, "0.34.0", "https://example.invalid/ollama.tar.zst")
    spec = dataclasses.replace(SPEC, engine="ollama", ollama_url=seen.url, ollama_version="0.34.0")
    assert b"SELFHOST_OLLAMA_SHA256=''\n" in install.env_file(spec)
    told = install.env_file(dataclasses.replace(spec, archive=seen))
    assert f"SELFHOST_OLLAMA_SHA256='{seen.sha256}'\n".encode() in told
    assert b"SELFHOST_OLLAMA_BYTES='1900'\n" in told


@pytest.mark.parametrize("text", ["", "garbage", "1900 not-a-checksum 0.34.0 https://example.invalid/ollama.tar.zst"])
def test_what_a_box_says_of_its_archive_is_kept_only_when_it_makes_sense(
    box: Box, remote: RemoteFake, wanted: dict[str, tuple[bytes, int]], text: str
) -> None:
    (box.run).mkdir(parents=True)
    (box.run / "archive").write_text(text + "\n")
    assert install.bring(remote, wanted, lambda event: None).archive is None
    seen = Archive(1900, "ab" * 32, "0.34.0", "https://example.invalid/ollama.tar.zst")
    (box.run / "archive").write_text(f"{seen}\n")
    assert install.bring(remote, wanted, lambda event: None).archive == seen


@pytest.mark.parametrize(
    "value",
    ["it's", "''", "a b\tc", "$HOME `id` $(id) \\", "two\nlines", '"', "#x", "-n", "é✓", "", "a'\\''b", "%s\\n"],
)
def test_env_file_survives_the_shell_whatever_the_value(value: str) -> None:
    spec = dataclasses.replace(SPEC, model=value, token=value, url=value, size=7)
    script = install.env_file(spec).decode() + 'printf "%s|" "$SELFHOST_MODEL" "$SELFHOST_TOKEN" "$SELFHOST_MODEL_URL"'
    script += ' "$SELFHOST_MODEL_BYTES" "$SELFHOST_CONTEXT"'
    out = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout.decode()
    assert out == f"{value}|{value}|{value}|7|4096|"


def test_a_nul_byte_is_refused() -> None:
    with pytest.raises(SelfhostError, match="NUL"):
        install.env_file(dataclasses.replace(SPEC, model="a\0b"))


def test_the_token_is_not_in_the_specs_repr() -> None:
    assert "secret" not in repr(SPEC)


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("@selfhost\tmodel\tprogress\t10\t20\ta.gguf", Event("model", "progress", "a.gguf", 10, 20)),
        ("@selfhost\tmodel\tprogress\t10\t\ta.gguf\n", Event("model", "progress", "a.gguf", 10, None)),
        ("@selfhost\ttools\tskip\t\t\ta\tb", Event("tools", "skip", "a\tb")),
        (f"@selfhost\tmodel\tprogress\t1\t{10**400}\ta.gguf", Event("model", "progress", "a.gguf", 1, None)),
        ("@selfhost\tdown\tdone\t\t\tnothing is left", Event("install", "done", "nothing is left")),
        ("@selfhost\ttools\tweird\t\t\tx", None),
        ("@selfhost\ttools\tdone", None),
        ("Welcome to vast.ai.", None),
        ("", None),
    ],
)
def test_progress_lines_become_events_and_noise_does_not(line: str, event: Event | None) -> None:
    assert install.parse(line) == event


def test_renewing_the_lease_moves_its_time(box: Box, remote: RemoteFake) -> None:
    assert remote.run(install.RENEW_LEASE).code != 0
    box.run.mkdir(parents=True)
    lease = box.run / "lease"
    lease.touch()
    os.utime(lease, (1, 1))
    assert remote.run(install.RENEW_LEASE).code == 0
    assert time.time() - lease.stat().st_mtime < 60


def test_a_renewal_hears_of_a_verdict_that_the_last_look_would_not_give(box: Box, remote: RemoteFake) -> None:
    """Once the lease is renewed, "lease not renewed" is in run/verdict only; the watchdog goes by that."""
    box.run.mkdir(parents=True)
    (box.run / "watch").write_text("9/9/9/9 3700 0 120 0.4500 \n")
    assert _heard(remote).verdict == ""
    (box.run / "verdict").write_text("lease not renewed for 2701 s\n")
    assert _heard(remote) == countdown.Measured(3700, 0, 120, 0.45, "lease not renewed for 2701 s", 9, 9)


def _heard(remote: RemoteFake) -> countdown.Measured:
    measured = countdown.parse(remote.run(install.RENEW_LEASE).out)
    assert measured
    return measured


def test_armed_is_what_the_watchdog_wrote(box: Box, remote: RemoteFake) -> None:
    assert install.armed(remote) == ""
    box.run.mkdir(parents=True)
    (box.run / "armed").write_text("refused 403\n")
    assert install.armed(remote) == "refused 403"
