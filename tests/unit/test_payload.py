"""The bytes that travel to a box."""

from __future__ import annotations

import base64
import gzip
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from selfhost_cli import payload
from selfhost_cli.errors import SelfhostError

PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n".format(
    "\n".join(["b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW"] * 4 + ["QyNTUxOQ=="])
)
PUBLIC = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "M" * 43


def test_onstart_leaves_room_below_the_markets_limit() -> None:
    text = payload.onstart(PRIVATE, PUBLIC + " root@box", PUBLIC + " me@laptop")
    assert len(text.encode()) <= payload.ONSTART_LIMIT - 50
    assert text.isascii()


def test_onstart_is_the_keys_the_packed_watchdog_and_the_script() -> None:
    lines = payload.onstart(PRIVATE, PUBLIC, PUBLIC).splitlines()
    assert lines[0] == "#!/bin/sh"
    values = "\n".join(lines).split("'")
    assert values[0] == "#!/bin/sh\nHOST_KEY="
    assert values[1] == PRIVATE.strip()
    packed = next(line for line in lines if line.startswith("WATCHDOG=")).split("'")[1]
    assert gzip.decompress(base64.b64decode(packed)) == payload.strip(payload.script("watchdog.sh"))
    assert "\n".join(lines).endswith(payload.strip(payload.script("onstart.sh")).decode().strip())


def test_the_same_keys_give_the_same_text() -> None:
    assert payload.onstart(PRIVATE, PUBLIC, PUBLIC) == payload.onstart(PRIVATE, PUBLIC, PUBLIC)


def test_comments_of_keys_stay_at_home() -> None:
    text = payload.onstart(PRIVATE, PUBLIC + " it's `me`", PUBLIC + " '; rm -rf / #")
    assert "me`" not in text
    assert "rm -rf" not in text


def test_a_start_script_that_is_too_long_is_an_error_with_a_remedy() -> None:
    with pytest.raises(SelfhostError, match="less than 4000") as caught:
        payload.onstart(PRIVATE, PUBLIC, "ssh-rsa " + "A" * 700)
    assert "ssh-ed25519" in caught.value.remedy


@pytest.mark.parametrize(
    "key", ["", "hello", "ssh-ed25519", "ssh-ed25519 AA'AA", "-----BEGIN X-----\nA\n-----END X-----"]
)
def test_what_is_no_public_key_is_refused(key: str) -> None:
    with pytest.raises(SelfhostError, match="not a public key"):
        payload.onstart(PRIVATE, PUBLIC, key)


@pytest.mark.parametrize("key", ["", PUBLIC, PRIVATE.replace("\n-----END", "'; reboot '\n-----END")])
def test_what_is_no_private_key_is_refused(key: str) -> None:
    with pytest.raises(SelfhostError, match="not a private key"):
        payload.onstart(key, PUBLIC, PUBLIC)


def test_stripping_takes_comments_and_indentation_and_nothing_else() -> None:
    script = b"#!/bin/sh\n# why\n\nif true; then\n    echo '# no comment' # stays\nfi\n"
    assert payload.strip(script) == b"if true; then\necho '# no comment' # stays\nfi\n"


@pytest.mark.parametrize("name", ["onstart.sh", "watchdog.sh"])
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_stripped_scripts_are_still_scripts(name: str, shell: str) -> None:
    subprocess.run([shell, "-n"], input=payload.strip(payload.script(name)), check=True)


def test_the_proxy_zip_is_reproducible_and_holds_the_proxy_alone() -> None:
    data = payload.proxy_zip()
    assert data == payload.proxy_zip()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert "selfhost_cli/__init__.py" in names
    assert [n for n in names if not n.startswith("selfhost_cli/proxy/")] == ["selfhost_cli/__init__.py"]
    assert all(name.endswith(".py") for name in names)


def test_the_zip_is_importable_without_anything_else_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "proxy.zip"
    file.write_bytes(payload.proxy_zip())
    code = "import selfhost_cli; print(selfhost_cli.__version__, selfhost_cli.__file__)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(file)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(file) in result.stdout


def test_digest_is_what_sha256sum_prints() -> None:
    assert payload.digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
