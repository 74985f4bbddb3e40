"""The deaths that need neither laptop nor account key (DESIGN, money rule 6), on the shipped watchdog."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from selfhost_cli import install, payload
from tests.templates.box import Box, Market, command_line, eventually

DELETE = ("DELETE", "/api/v0/instances/4711/", "{}")
LIMITS = {
    "SELFHOST_LEASE_S": "1000",
    "SELFHOST_IDLE_S": "1000",
    "SELFHOST_MAX_S": "100000",
    "SELFHOST_MAX_DOLLARS": "5",
    "SELFHOST_DPH": "0.40",
    "SELFHOST_DOWN_PER_GB": "0.01",
    "SELFHOST_UP_PER_GB": "0.02",
}
QUIET = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes packets\n"


def net_dev(**interfaces: tuple[float, float]) -> str:
    """The kernel's table: interface -> (received, sent) gigabytes."""
    row = "{:>6}:{:.0f} 9 0 0 0 0 0 0 {:.0f} 9 0 0 0 0 0 0\n"
    return QUIET + "".join(row.format(name, r * 1e9, t * 1e9) for name, (r, t) in interfaces.items())


Watch = Callable[..., None]


def plain(box: Box) -> dict[str, str]:
    """The environment of an ssh session: nothing of the market's."""
    return {"HOME": str(box.home), "PATH": box.env["PATH"]}


def watchdogs(box: Box) -> list[int]:
    return [pid for pid in box.processes() if command_line(pid) == "sh bin/watchdog.sh - "]


def loops(box: Box) -> list[int]:
    """What starts a watchdog again."""
    return [pid for pid in box.processes() if command_line(pid).startswith("sh -c until ")]


def only_watchdog(box: Box, besides: int = 0) -> int:
    """The pid of the one that lives, once it is not `besides`; its subshells look the same for a moment."""

    def alone() -> bool:
        pid = box.text("run/watchdog.pid")
        return pid not in ("", str(besides)) and watchdogs(box) == [int(pid)] and len(loops(box)) == 1

    eventually(alone)
    return int(box.text("run/watchdog.pid"))


@pytest.fixture
def watch(box: Box) -> Iterator[Watch]:
    """Starts the watchdog with these limits over the harmless ones."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**env: str) -> None:
        box.run.mkdir(parents=True, exist_ok=True)
        for folder in ("bin", "log"):
            (box.dir / folder).mkdir(exist_ok=True)
        values = {**box.env, **LIMITS, **env}
        lines = (f"{k}='{v}'\n" for k, v in values.items() if k.startswith(("CONTAINER", "SELFHOST")))
        (box.run / "box.env").write_text("".join(lines))
        script = box.dir / "bin/watchdog.sh"
        script.write_bytes(payload.strip(payload.script("watchdog.sh")))
        if not (box.root / "net_dev").exists():
            (box.root / "net_dev").write_text(net_dev(eth0=(0, 0)))
        with (box.path / "watchdog.log").open("ab") as log:
            started.append(
                subprocess.Popen(["sh", "bin/watchdog.sh"], cwd=box.dir, env=plain(box), stdout=log, stderr=log)
            )

    yield start
    for process in started:
        process.kill()
        process.wait()


def age(box: Box, name: str, seconds: float) -> None:
    path = box.run / name
    path.touch()
    then = time.time() - seconds
    os.utime(path, (then, then))


def ticks(box: Box, market: Market, count: int = 3) -> None:
    """The watchdog looked `count` times more. A look that finds nothing leaves no trace, so it has to arm itself again,
    which it does at the beginning of a tick."""
    for _ in range(count):
        before = len(market.calls)
        (box.run / "armed").unlink(missing_ok=True)
        eventually(lambda before=before: len(market.calls) > before and box.text("run/armed"))


def test_a_lease_that_is_not_renewed_ends_the_box(box: Box, market: Market, watch: Watch) -> None:
    watch()
    eventually(lambda: box.text("run/armed") == "ok")
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)
    assert market.auth == {"Bearer box-key-0123456789"}
    assert market.calls[1] == DELETE
    assert box.text("run/verdict").startswith("lease not renewed for 1")


def test_a_renewed_lease_keeps_it(box: Box, market: Market, watch: Watch) -> None:
    age_before_start = 900
    box.run.mkdir(parents=True)
    age(box, "lease", age_before_start)
    watch()
    ticks(box, market)
    assert DELETE not in market.calls
    assert box.text("run/verdict") == ""


def test_a_lost_lease_file_counts_from_the_first_start(box: Box, market: Market, watch: Watch) -> None:
    box.run.mkdir(parents=True)
    (box.run / "started").write_text(str(int(time.time()) - 1100))
    watch()
    eventually(lambda: box.text("run/armed"))
    assert DELETE not in market.calls
    (box.run / "lease").unlink()
    eventually(lambda: DELETE in market.calls)


def test_idleness_counts_only_from_readiness(box: Box, market: Market, watch: Watch) -> None:
    box.run.mkdir(parents=True)
    age(box, "activity", 5000)
    watch()
    ticks(box, market)
    age(box, "ready", 900)
    ticks(box, market)
    assert DELETE not in market.calls
    age(box, "ready", 1100)
    eventually(lambda: DELETE in market.calls)
    assert box.text("run/verdict").startswith("idle for 1")


def test_activity_keeps_a_ready_box(box: Box, market: Market, watch: Watch) -> None:
    box.run.mkdir(parents=True)
    age(box, "activity", 10)
    age(box, "ready", 5000)
    watch()
    ticks(box, market)
    assert DELETE not in market.calls


def test_the_hard_cap_counts_from_the_first_start(box: Box, market: Market, watch: Watch) -> None:
    box.run.mkdir(parents=True)
    (box.run / "started").write_text(str(int(time.time()) - 7300))
    watch(SELFHOST_MAX_S="7200", SELFHOST_DPH="0")
    eventually(lambda: DELETE in market.calls)
    assert box.text("run/verdict").startswith("time cap: 73")


@pytest.mark.parametrize(
    ("hours", "traffic", "dead"),
    [
        (2.4, {"eth0": (0.0, 0.0)}, False),
        (2.6, {"eth0": (0.0, 0.0)}, True),
        (1.0, {"eth0": (50.0, 0.0)}, False),
        (1.0, {"eth0": (50.0, 6.0)}, True),
        (1.0, {"eth0": (30.0, 0.0), "eth1": (31.0, 0.0)}, True),
        (1.0, {"lo": (900.0, 900.0)}, False),
    ],
)
def test_the_money_cap_counts_time_and_bytes_of_every_real_interface(
    hours: float, traffic: dict[str, tuple[float, float]], dead: bool, box: Box, market: Market, watch: Watch
) -> None:
    box.run.mkdir(parents=True)
    (box.run / "started").write_text(str(int(time.time() - hours * 3600)))
    watch(SELFHOST_MAX_DOLLARS="1.0")
    eventually(lambda: box.text("run/armed"))
    (box.root / "net_dev").write_text(net_dev(**traffic))
    if dead:
        eventually(lambda: DELETE in market.calls)
        assert box.text("run/verdict").startswith("money cap: $1.0")
    else:
        ticks(box, market)
        assert DELETE not in market.calls


def test_an_unreadable_traffic_table_does_not_disarm_the_other_caps(box: Box, market: Market, watch: Watch) -> None:
    watch(SELFHOST_NET_DEV="/nowhere")
    eventually(lambda: box.text("run/armed"))
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)


def test_the_bytes_from_before_a_restart_of_the_container_are_not_forgotten(
    box: Box, market: Market, watch: Watch
) -> None:
    def counted() -> str:
        return box.text("run/watch").partition(" ")[0]

    watch(SELFHOST_MAX_DOLLARS="0.915", SELFHOST_DPH="0")
    table = box.root / "net_dev"
    table.write_text(net_dev(eth0=(40, 5)))
    eventually(lambda: counted() == "40000000000/5000000000/40000000000/5000000000")
    box.kill_all()
    table.write_text(net_dev(eth0=(1, 0)))
    watch(SELFHOST_MAX_DOLLARS="0.915", SELFHOST_DPH="0")
    eventually(lambda: counted() == "41000000000/5000000000/1000000000/0")
    table.unlink()  # read at no look: nothing is counted, or forgotten
    ticks(box, market)
    table.write_text(net_dev(eth0=(21, 10)))
    eventually(lambda: counted().startswith("61000000000/15000000000/"))
    assert DELETE not in market.calls
    table.write_text(net_dev(eth0=(22, 10)))
    eventually(lambda: DELETE in market.calls)
    assert box.text("run/verdict").startswith("money cap: $0.9")


def test_what_it_measures_is_there_to_be_read(box: Box, market: Market, watch: Watch) -> None:
    box.run.mkdir(parents=True)
    (box.run / "started").write_text(str(int(time.time()) - 3600))
    age(box, "lease", 40)
    age(box, "ready", 900)
    watch()
    up, lease, idle, dollars, *rest = eventually(lambda: box.text("run/watch").split()[1:])
    assert 3600 <= int(up) < 3700
    assert 40 <= int(lease) < 140
    assert 900 <= int(idle) < 1000
    assert float(dollars) == pytest.approx(0.40, rel=0.05)
    assert rest == []
    age(box, "activity", 0)
    eventually(lambda: int(box.text("run/watch").split()[3]) < 100)
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)
    assert " lease not renewed for 1" in box.text("run/watch")


def test_a_full_disk_costs_neither_the_count_nor_the_verdict(box: Box, market: Market, watch: Watch) -> None:
    box.run.mkdir(parents=True)
    (box.run / "watch.new").symlink_to("/dev/full")
    watch(SELFHOST_MAX_DOLLARS="0.90", SELFHOST_DPH="0")
    table = box.root / "net_dev"
    table.write_text(net_dev(eth0=(80, 0)))
    ticks(box, market)
    table.write_text(net_dev(eth0=(5, 0)))
    ticks(box, market)
    assert DELETE not in market.calls
    table.write_text(net_dev(eth0=(15, 0)))
    eventually(lambda: market.count("DELETE", "{}") > 1)


@pytest.mark.parametrize("jump", [-31_536_000, 7200])
def test_a_clock_that_is_set_makes_no_box_live_longer_or_shorter(
    jump: int, box: Box, market: Market, watch: Watch
) -> None:
    def pretend(jumped: int) -> None:
        """The clock stays as it is, and the kernel says that less time has passed since its start: the same to see."""
        draft = box.root / "uptime.new"
        draft.write_text(f"{time.monotonic() - jumped + 40_000_000:.2f} 1.00\n")
        draft.replace(box.root / "uptime")

    box.run.mkdir(parents=True)
    pretend(0)
    began = time.time() - 3600
    (box.run / "started").write_text(str(int(began)))
    age(box, "lease", 600)
    age(box, "ready", 600)
    watch(SELFHOST_UPTIME=str(box.root / "uptime"), SELFHOST_MAX_S="900000000", SELFHOST_DPH="0")
    eventually(lambda: box.text("run/watch"))
    pretend(jump)
    eventually(lambda: abs(int(box.text("run/started") or 0) - began - jump) < 60)
    ticks(box, market)
    up, lease, idle = (int(word) for word in box.text("run/watch").split()[1:4])
    assert abs(up - (3600 - jump)) < 100  # it is the clock that has not really moved here
    assert lease < 100
    assert idle < 100
    assert DELETE not in market.calls


def test_without_limits_the_defaults_hold(box: Box, market: Market, watch: Watch) -> None:
    watch(**dict.fromkeys(LIMITS, ""))
    eventually(lambda: box.text("run/armed"))
    age(box, "lease", 2600)
    ticks(box, market)
    assert DELETE not in market.calls
    age(box, "lease", 2800)
    eventually(lambda: DELETE in market.calls)


def test_limits_can_be_moved_later_and_nonsense_in_them_is_ignored(box: Box, market: Market, watch: Watch) -> None:
    box.run.mkdir(parents=True)
    (box.run / "limits").write_text(
        "SELFHOST_LEASE_S=9000\nSELFHOST_MAX_S=; touch pwned\nSELFHOST_MAX_S=$(touch pwned)\nPATH=1\n"
        "SELFHOST_IDLE_S=-1\n SELFHOST_MAX_DOLLARS=0\nCONTAINER_ID=1\nSELFHOST_IDLE_S=\n"
    )
    age(box, "lease", 5000)
    watch()
    ticks(box, market)
    assert DELETE not in market.calls
    assert not list(box.path.rglob("pwned"))
    (box.run / "limits").unlink()
    eventually(lambda: DELETE in market.calls)


def test_dollars_are_counted_with_the_price_that_the_box_was_told(box: Box, market: Market, watch: Watch) -> None:
    """From the start on, whatever its offer had said."""
    box.run.mkdir(parents=True)
    (box.run / "started").write_text(str(int(time.time()) - 3600))
    watch(SELFHOST_MAX_DOLLARS="0.60")
    ticks(box, market)
    assert DELETE not in market.calls
    (box.run / "limits").write_text("SELFHOST_DPH=0.790000\n")
    eventually(lambda: DELETE in market.calls)
    assert "money cap" in box.text("run/verdict")


@pytest.mark.parametrize(("status", "said"), [(403, "refused 403"), (404, "refused 404")])
def test_a_definite_refusal_to_arm_is_recorded_and_final(
    status: int, said: str, box: Box, market: Market, watch: Watch
) -> None:
    market.status = lambda method, body: status
    watch()
    assert eventually(lambda: box.text("run/armed")) == said
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)
    assert market.count("PUT", '{"state":"running"}') == 1


@pytest.mark.parametrize("status", [429, 408, 500, 502, 302])
def test_arming_is_tried_again_until_the_market_makes_up_its_mind(
    status: int, box: Box, market: Market, watch: Watch
) -> None:
    answers = iter([status, status, 200])
    market.status = lambda method, body: next(answers)
    watch()
    assert eventually(lambda: box.text("run/armed")) == "ok"
    assert market.count("PUT", '{"state":"running"}') == 3


def test_a_box_without_curl_says_that_it_cannot_be_armed(box: Box, watch: Watch) -> None:
    (box.tools / "curl").unlink()
    watch()
    assert eventually(lambda: box.text("run/armed")) == "refused no curl"


def test_when_destroying_keeps_failing_it_stops_the_box_and_at_last_the_engine(
    box: Box, market: Market, watch: Watch
) -> None:
    market.status = lambda method, body: 500 if method == "DELETE" else 200
    watch()
    (box.dir / "bin/stop.sh").write_text('echo "$*" >>../stopped\n')
    age(box, "lease", 1100)
    eventually(lambda: market.count("PUT", '{"state":"stopped"}') >= 2)
    first_stop = market.calls.index(("PUT", "/api/v0/instances/4711/", '{"state":"stopped"}'))
    assert sum(1 for call in market.calls[:first_stop] if call == DELETE) == 5
    assert eventually(lambda: box.text("stopped")) == "engine"
    assert market.count("DELETE", "{}") >= 10
    eventually(lambda: market.count("DELETE", "{}") >= 12)
    assert box.text("stopped") == "engine"


def test_the_verdict_stands_even_when_the_lease_is_renewed(box: Box, market: Market, watch: Watch) -> None:
    market.status = lambda method, body: 503 if method == "DELETE" else 200
    watch()
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)
    (box.run / "lease").touch()
    seen = market.count("DELETE", "{}")
    eventually(lambda: market.count("DELETE", "{}") > seen + 1)


def test_the_verdict_stands_even_when_the_watchdog_is_another_one(box: Box, market: Market, watch: Watch) -> None:
    market.status = lambda method, body: 503 if method == "DELETE" else 200
    watch()
    age(box, "lease", 1100)
    eventually(lambda: box.text("run/verdict"))
    box.kill_all()
    (box.run / "lease").touch()
    seen = market.count("DELETE", "{}")
    watch()
    eventually(lambda: market.count("DELETE", "{}") > seen)


def test_a_killed_watchdog_is_started_again(box: Box, market: Market, watch: Watch) -> None:
    watch()
    first = only_watchdog(box)
    # The process is there a moment before it has written when it began.
    eventually(lambda: box.text("run/started"))
    started = box.text("run/started")
    os.kill(first, signal.SIGKILL)
    only_watchdog(box, besides=first)
    assert box.text("run/started") == started
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)


def kill_watchdog_and_loop(box: Box) -> int:
    pid = only_watchdog(box)
    for one in (*loops(box), pid):
        os.kill(one, signal.SIGKILL)
    eventually(lambda: not watchdogs(box) and not loops(box))
    return pid


def test_whoever_renews_the_lease_finds_a_dead_watchdog_and_starts_it(box: Box, market: Market, watch: Watch) -> None:
    def renew() -> str:
        return box.sh("-c", install.RENEW_LEASE, timeout=5).stdout

    watch()
    eventually(lambda: box.text("run/watch"))
    dead = kill_watchdog_and_loop(box)
    box.env = plain(box)
    measured = box.text("run/watch")
    assert renew().strip() == measured.strip()
    alive = only_watchdog(box, besides=dead)
    for _ in range(5):
        renew()
    assert only_watchdog(box) == alive


def test_the_loops_of_engine_and_proxy_start_a_dead_watchdog(box: Box, market: Market, watch: Watch) -> None:
    watch()
    dead = kill_watchdog_and_loop(box)
    box.env = plain(box)
    box.put_parts()
    for folder in ("engine/venv", "proxy/venv"):
        (box.dir / folder).mkdir(parents=True, exist_ok=True)
    box.sh(str(box.dir / "bin/start.sh"))
    alive = only_watchdog(box, besides=dead)
    box.sh(str(box.dir / "bin/stop.sh"))
    assert only_watchdog(box) == alive
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)


def test_of_many_watchdogs_one_stays(box: Box, market: Market, watch: Watch) -> None:
    for _ in range(8):
        watch()
    only_watchdog(box)


def test_it_ignores_hangups_and_polite_requests_to_end(box: Box, market: Market, watch: Watch) -> None:
    watch()
    eventually(lambda: box.text("run/armed"))
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        os.kill(int(box.text("run/watchdog.pid")), number)
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)


def test_the_key_is_never_an_argument(box: Box, market: Market, watch: Watch) -> None:
    watch()
    age(box, "lease", 1100)
    eventually(lambda: DELETE in market.calls)
    ours = [line for line in market.seen_in_ps if "/instances/4711/" in line]
    assert len(ours) >= 2
    assert not any("box-key" in line for line in ours)


def test_no_proxy_of_the_image_and_no_curlrc_stands_between_box_and_market(
    box: Box, market: Market, watch: Watch
) -> None:
    (box.home / ".curlrc").write_text("proxy = http://127.0.0.1:9\nfail\n")
    watch(SELFHOST_X="x'\nhttp_proxy='http://127.0.0.1:9'\nALL_PROXY='http://127.0.0.1:9")
    assert eventually(lambda: box.text("run/armed")) == "ok"


def test_nothing_reads_the_first_process() -> None:
    for name in ("onstart.sh", "watchdog.sh", "install.sh", "start.sh", "stop.sh"):
        assert b"/proc/1" not in payload.strip(payload.script(name))
