"""The mirror: what curl and pip need of it, and its switches."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.sandbox.market_process import MarketProcess

BODY = bytes(range(256)) * 4000


@pytest.fixture
def url(clean: MarketProcess) -> str:
    (clean.cache / "models/model.bin").write_bytes(BODY)
    return f"{clean.facts['mirror']}/models/model.bin"


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def test_a_file_is_served_whole_with_an_etag(http: httpx.Client, url: str) -> None:
    answer = http.get(url)
    assert (answer.status_code, answer.content) == (200, BODY)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert http.get(url, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    head = http.head(url)
    assert (head.headers["Content-Length"], head.headers["ETag"]) == (str(len(BODY)), answer.headers["ETag"])


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=1000-", 206, slice(1000, None)),
        ("bytes=10-19", 206, slice(10, 20)),
        ("bytes=-5", 206, slice(-5, None)),
        ("bytes=0-99999999", 206, slice(0, None)),
        (f"bytes={len(BODY)}-", 416, slice(0, 0)),
        ("bytes=9-3", 416, slice(0, 0)),
    ],
)
def test_ranges(http: httpx.Client, url: str, asked: str, status: int, part: slice) -> None:
    answer = http.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (status, BODY[part])


def test_a_range_of_another_version_is_not_served(http: httpx.Client, url: str) -> None:
    answer = http.get(url, headers={"Range": "bytes=10-", "If-Range": '"another"'})
    assert (answer.status_code, answer.content) == (200, BODY)


def test_nothing_outside_the_cache_is_served(clean: MarketProcess, http: httpx.Client) -> None:
    (clean.cache / "secret").write_text("s")
    paths = ["models/nothing", "models/..%2Fsecret", "models/../secret", "secret", "state/market.json"]
    paths += ["ollama/..%2F/secret", "ollama/..%2F../secret", "ollama/../secret", "registry/lock", "partial/x"]
    for path in paths:
        assert http.get(f"{clean.facts['mirror']}/{path}").status_code == 404, path


def test_curl_resumes_a_transfer_that_was_cut(clean: MarketProcess, url: str, tmp_path: Path) -> None:
    clean.set("/mirror", cut_after=300_000)
    target = tmp_path / "model.part"
    command = ["curl", "-sS", "-C", "-", "-o", str(target), url]
    assert subprocess.run(command, capture_output=True).returncode != 0
    kept = target.stat().st_size
    assert 0 < kept <= 300_000
    clean.set("/mirror")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert target.read_bytes() == BODY


def test_a_cut_can_be_limited_to_so_many_answers(clean: MarketProcess, http: httpx.Client, url: str) -> None:
    clean.set("/mirror", cut_after=300_000, cuts=2)
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            http.get(url)
    assert http.get(url).content == BODY


def test_a_corrupt_transfer_has_the_right_size_and_other_bytes(
    clean: MarketProcess, http: httpx.Client, url: str
) -> None:
    clean.set("/mirror", corrupt=True)
    answer = http.get(url)
    assert (answer.status_code, len(answer.content)) == (200, len(BODY))
    assert answer.content != BODY
    clean.set("/mirror")
    assert http.get(url).content == BODY


@pytest.mark.parametrize("folder", ["0.34.0-0a1b2c3d", "current"])
def test_ollamas_archive_is_served_whatever_version_is_asked_for(
    clean: MarketProcess, http: httpx.Client, folder: str
) -> None:
    built = clean.cache / "ollama/0.34.0-0a1b2c3d"
    built.mkdir(parents=True, exist_ok=True)
    (built / "ollama-linux-amd64.tar.zst").write_bytes(BODY)
    if not (built.parent / "current").is_symlink():
        (built.parent / "current").symlink_to(built.name)
    url = f"{clean.facts['mirror']}/ollama/{folder}/ollama-linux-amd64.tar.zst?version=0.34.0"
    answer = http.get(url, headers={"Range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, BODY[10:20])


def test_a_stalled_transfer_says_nothing_until_it_is_switched_off(clean: MarketProcess, url: str) -> None:
    clean.set("/mirror", stall_after=100_000)
    with httpx.Client(trust_env=False, timeout=0.5) as http, http.stream("GET", url) as answer:
        got = b""
        chunks = answer.iter_raw()
        while len(got) < 100_000:
            got += next(chunks)
        with pytest.raises(httpx.ReadTimeout):
            next(chunks)
    assert got == BODY[:100_000]


def test_a_rate_can_be_set(clean: MarketProcess, http: httpx.Client, url: str) -> None:
    clean.set("/mirror", rate=2_000_000)
    started = time.monotonic()
    assert http.get(url).content == BODY
    assert time.monotonic() - started > 0.4


def test_all_that_one_box_downloads_shares_one_link(clean: MarketProcess, url: str, tmp_path: Path) -> None:
    clean.set("/mirror", rate=2_000_000)
    started = time.monotonic()
    command = ["curl", "-sS", "-o"]
    both = [subprocess.Popen([*command, str(tmp_path / name), url]) for name in "ab"]
    assert [one.wait(20) for one in both] == [0, 0]
    assert time.monotonic() - started > 2 * len(BODY) / 2_000_000 - 0.2


def test_a_transfer_can_become_slow_while_the_next_one_is_fast(clean: MarketProcess, url: str, tmp_path: Path) -> None:
    clean.set("/mirror", slow_after=300_000, slow_rate=1000, slows=1)
    target = tmp_path / "model.part"
    command = ["curl", "-sS", "-C", "-", "-o", str(target), url]
    assert subprocess.run([*command, "-y", "1", "-Y", "100000"], capture_output=True).returncode == 28
    assert 290_000 < target.stat().st_size < 320_000
    assert subprocess.run([*command, "-m", "10"], capture_output=True).returncode == 0
    assert target.read_bytes() == BODY


def test_pip_finds_wheels(clean: MarketProcess, tmp_path: Path) -> None:
    with zipfile.ZipFile(clean.cache / "wheels/tiny_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_thing.py", "")
        wheel.writestr("tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    links = f"{clean.facts['mirror']}/wheels/"
    command = [sys.executable, "-m", "pip", "--isolated", "download", "-q", "--no-index", "--find-links", links]
    subprocess.run([*command, "-d", str(tmp_path), "tiny-thing==1.0"], check=True)
    assert (tmp_path / "tiny_thing-1.0-py3-none-any.whl").is_file()
