"""A GPU machine of one's own instead of a rented box: installed over the user's own ssh, used, stopped, wiped."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from selfhost_cli import attach
from selfhost_cli.model import BoxSpec, BoxState, Need
from selfhost_cli.providers.vast import VastProvider
from selfhost_cli.remote.ssh import make_key
from selfhost_cli.sandbox import demo
from tests.e2e.stage import Stage
from tests.e2e.test_prewarm import first_turn
from tests.integration.conftest import Box
from tests.integration.test_openssh import configure
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

OFF = {"SELFHOST_CACHE": "off"}


def processes(*words: str) -> list[int]:
    """Those whose command line has all of these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(folder.name))
    return found


@pytest.fixture
def stage(make_stage: Callable[..., Stage]) -> Stage:
    return make_stage()


@pytest.fixture
def own(stage: Stage, tmp_path: Path) -> Iterator[Box]:
    """A machine that the user can log in to, and selfhost knows nothing of: a box, rented behind its back."""
    private, public = make_key("login")
    login = tmp_path / "key"
    login.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    login.write_text(private)
    provider = VastProvider(stage.market.api_key, stage.market.url)
    provider.register_key(public)
    offer = provider.offers(Need(disk_gb=10.0, hours=0.1))[0]
    number = provider.create(offer, BoxSpec("mine", "vastai/base-image:test", 10.0, "true", {}))
    found = until(lambda: (row := provider.get(number)) and row.state is BoxState.RUNNING and row)
    assert found.direct
    root = stage.box()
    host_key = until(lambda: (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text())
    box = Box(found.direct, host_key, login, root)
    until(box.lets_us_in)
    stage.settings["SELFHOST_SSH_CONFIG"] = configure(box, tmp_path, host_key)
    yield box
    provider.destroy(number)


def test_it_serves_like_a_rented_box_and_goes_without_a_trace(stage: Stage, own: Box) -> None:
    told = stage.ask("up", "--ssh", "own", "--json").json["machine"]
    assert (told["name"], told["model"]) == ("own", demo.MODEL)
    (row,) = [row for row in stage.ask("use", "--json").json if row["place"]]
    assert (row["name"], row["kind"], row["state"]) == ("own", "ssh", "up")
    assert "SELFHOST_PACKAGES='no'" in (own.home / ".selfhost/run/install.env").read_text()
    assert not (own.home / ".selfhost/bin/watchdog.sh").exists()

    said = stage.ask("claude", "-p", "Say yes.", "--tools", "", "--system-prompt", demo.SYSTEM_PROMPT, env=OFF)
    assert said.out.strip()

    (tunnel,) = processes("ssh", "-L", "127.0.0.1:", "cat >/dev/null", stage.settings["SELFHOST_SSH_CONFIG"])
    os.kill(tunnel, signal.SIGKILL)
    until(lambda: [row for row in stage.ask("use", "--json").json if row["state"] == "up"])
    assert stage.ask("ask", "Say no.", env=OFF).out.strip()

    stage.ask("down", "--ssh", "own")
    assert not processes(str(own.home / ".selfhost"))
    assert (own.home / ".selfhost").exists()
    assert [row["name"] for row in stage.ask("use", "--json").json if row["place"]] == ["vast"]
    stage.ask("down", "--ssh", "own", "--wipe")
    assert not (own.home / ".selfhost").exists()
    assert [row["name"] for row in stage.ask("use", "--json").json] == ["vast"]
    stage.wait_for_keeper_to_end()
    assert not processes("ssh", stage.settings["SELFHOST_SSH_CONFIG"])


def test_what_another_installation_has_there_is_left_alone(stage: Stage, own: Box) -> None:
    there = own.home / ".selfhost/run/install.env"
    there.parent.mkdir(parents=True)
    there.write_text("SELFHOST_TOKEN='of somebody else'\n")
    said = stage.ask("up", "--ssh", "own", "--detach", code=2).err
    assert "belongs to another installation" in said
    assert "down --ssh own --wipe" in said
    assert there.read_text() == "SELFHOST_TOKEN='of somebody else'\n"
    assert [row["name"] for row in stage.ask("use", "--json").json] == ["vast"]


def test_its_first_turn_is_read_ahead(stage: Stage, own: Box, tmp_path: Path) -> None:
    stage.ask("up", "--ssh", "own", "--detach", cwd=tmp_path)
    total, reused = first_turn(stage, "Say hi.", tmp_path)
    assert reused < 100 < total
    stage.ask("down", "--ssh", "own")
    stage.ask("up", "--ssh", "own", "--detach", cwd=tmp_path)

    def warm() -> bool:
        front = attach.find(stage.paths)
        assert front
        headers = {"authorization": f"Bearer {front.token}"}
        told = httpx.get(f"{front.url}/health", headers=headers, trust_env=False).json()
        return bool(told["box"]["prefix"]["state"] == "warm")

    until(warm, seconds=60)
    total, reused = first_turn(stage, "Say hello.", tmp_path)
    assert total - reused < 50
    stage.ask("down", "--ssh", "own", "--wipe")


def test_a_killed_keeper_leaves_no_tunnel(stage: Stage, own: Box) -> None:
    stage.ask("up", "--ssh", "own", "--detach")
    words = ("ssh", "-L", stage.settings["SELFHOST_SSH_CONFIG"])
    assert processes(*words)
    keeper = stage.keeper
    assert keeper
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not processes(*words))
    stage.ask("down", "--ssh", "own", "--wipe")
