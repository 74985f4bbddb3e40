"""Real boxes: a real sshd, onstart's environment, what destroys them. Market and boxes are real processes."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
import pytest

from selfhost_cli.sandbox import image, processes
from tests.sandbox.market_process import MarketProcess
from tests.waiting import until

pytestmark = pytest.mark.box

QUERY = {"gpu_name": {"eq": "RTX 4090"}, "num_gpus": {"eq": 1}, "disk_space": {"gte": 50}}


@dataclass(frozen=True)
class Rented:
    market: MarketProcess
    id: int
    key: str

    @property
    def box(self) -> Path:
        return self.market.box(self.id)

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = self.market.sdk().show_instance(id=self.id)
        return row

    def port(self) -> int:
        row = until(lambda: (row := self.row())["actual_status"] == "running" and row)
        assert row["public_ipaddr"] == row["ssh_host"] == "127.0.0.1"
        assert row["ports"]["22/tcp"][0]["HostPort"] == str(row["ssh_port"])
        return int(row["ssh_port"])

    def log(self) -> str:
        path = self.box / "var/log/onstart.log"
        return path.read_text() if path.exists() else ""

    def destroy(self) -> None:
        self.market.sdk().destroy_instance(id=self.id)
        until(lambda: not self.box.exists())


def rent(
    market: MarketProcess, onstart: str = "", *, env: Mapping[str, str] | None = None, label: str | None = None
) -> Rented:
    sdk = market.sdk()
    offer = sdk.search_offers(query=QUERY, order="dph_total", storage=20)[0]
    answer = sdk.create_instance(
        id=offer["id"],
        image="some/image:1",
        disk=20,
        label=label,
        env=env or {},
        onstart_cmd=onstart,
        runtype="ssh_direct",
        cancel_unavail=True,
    )
    return Rented(market, answer["new_contract"], answer["instance_api_key"])


def connect(port: int, login: Path, seconds: float = 20.0) -> paramiko.SSHClient:
    """As `root@127.0.0.1`, once sshd lets us in."""
    deadline = time.monotonic() + seconds
    while True:
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        try:
            client.connect(
                "127.0.0.1",
                port,
                "root",
                key_filename=str(login),
                allow_agent=False,
                look_for_keys=False,
                timeout=5,
            )
        except (OSError, paramiko.SSHException):
            client.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return client


def say(client: paramiko.SSHClient, command: str) -> str:
    _, out, err = client.exec_command(command, timeout=20)
    text = out.read().decode()
    assert out.channel.recv_exit_status() == 0, err.read().decode()
    return text


def own_login(login: Path) -> str:
    """onstart that lets us in."""
    public = login.with_suffix(".pub").read_text().strip()
    return f"echo '{public}' >> ~/.ssh/authorized_keys\n"


def alive(pid: int) -> bool:
    """Running, not just waiting for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_box_is_a_whole_machine_for_its_root(clean: MarketProcess, login: Path) -> None:
    """Home, working directory, SFTP, tools, environment, banner, terminal; and its end."""
    rented = rent(clean, own_login(login) + "setsid sleep 1000 & echo $! > ~/sleeper\n", label="selfhost-box")
    with connect(rented.port(), login) as client:
        home = str(rented.box / "root")
        assert say(client, "echo ~ ~root; pwd; whoami").split() == [home, home, home, "root"]
        assert "Welcome to vast.ai" in (client.get_transport().get_banner() or b"").decode()  # type: ignore[union-attr]
        with client.open_sftp() as sftp:
            assert sftp.normalize(".") == home
            with sftp.open("put.txt", "w") as file:
                file.write("here")
        assert (rented.box / "root/put.txt").read_text() == "here"
        say(client, "chown root:root ~/put.txt && chmod 600 ~/put.txt && tar -cf - put.txt | tar -tf - >/dev/null")
        assert say(client, "for t in nvidia-smi ollama systemctl pkill; do command -v $t; done; echo none") == "none\n"
        refused = say(client, "apt-get install -y redis 2>&1; echo $?")
        assert "refused" in refused
        assert refused.endswith("100\n")
        seen = dict(line.split("=", 1) for line in say(client, "env").splitlines())
        assert seen["SELFHOST_ROOT"] == seen[processes.MARKER] == str(rented.box)
        assert seen["SELFHOST_SIMULATED_GPU"] == "1"
        assert seen["PATH"] == f"{rented.box}/bin"
        assert "CONTAINER_API_KEY" not in seen, "as on the real market, only PID 1 and its children have it"
        if os.getuid() == 0 and processes.can_have_private_mounts(rented.box):
            assert say(client, "touch /usr/x /etc/x 2>/dev/null || echo read-only") == "read-only\n"
        shell = client.invoke_shell()
        shell.settimeout(20)
        shell.send(b"tty; echo path=$PATH; exit\n")
        talk = b""
        while data := shell.recv(4096):
            talk += data
        assert b"/dev/pts/" in talk
        assert f"path={rented.box}/bin".encode() in talk
        sleeper = int((rented.box / "root/sleeper").read_text())
        assert alive(sleeper)
    rented.destroy()
    assert not alive(sleeper)
    assert clean.billed()["count"] == 0


def test_onstart_has_the_markets_environment_and_nothing_of_the_laptops(
    monkeypatch: pytest.MonkeyPatch, start_market: Callable[..., MarketProcess]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("LAPTOP_SECRET", "s")
    market = start_market()
    market.sdk().create_ssh_key(ssh_key="ssh-ed25519 AAAA account")
    rented = rent(market, "env\necho over\n", env={"SELFHOST_LEASE_S": "60", "-p 80:80": "1"})
    until(lambda: "over" in rented.log())
    seen = dict(line.split("=", 1) for line in rented.log().splitlines() if "=" in line)
    assert seen["CONTAINER_ID"] == str(rented.id)
    assert seen["CONTAINER_API_KEY"] == rented.key
    assert seen["VAST_CONTAINERLABEL"] == f"C.{rented.id}"
    assert seen["PUBLIC_IPADDR"] == "127.0.0.1"
    assert seen["VAST_TCP_PORT_22"] == str(rented.port())
    assert seen["SSH_PUBLIC_KEY"] == "ssh-ed25519 AAAA account"
    assert (seen["GPU_COUNT"], seen["SELFHOST_LEASE_S"]) == ("1", "60")
    assert seen["HOME"] == f"{seen['SELFHOST_ROOT']}/root" == f"{rented.box}/root"
    assert (rented.box / "net_dev").samefile(seen["SELFHOST_NET_DEV"])
    assert not [name for name in seen if "PROXY" in name.upper() or name in ("LAPTOP_SECRET", "-p 80:80")]
    keys = rented.box / "root/.ssh/authorized_keys"
    assert keys.read_text() == "ssh-ed25519 AAAA account\n"
    assert keys.stat().st_mode & 0o777 == 0o600
    assert "over" in market.sdk().logs(instance_id=rented.id)
    market.close()


def test_an_image_can_bring_an_ollama(clean: MarketProcess, tmp_path: Path) -> None:
    program = tmp_path / "some-ollama"
    program.write_text("#!/bin/sh\necho it says $1\n")
    program.chmod(0o755)
    clean.set("/settings", ollama=str(program))
    rented = rent(clean, "#!/bin/bash\nollama --version\n")
    until(lambda: rented.log() == "it says --version\n")


def test_two_boxes_live_side_by_side_and_one_outlives_the_other(clean: MarketProcess, login: Path) -> None:
    first, second = rent(clean, own_login(login)), rent(clean, own_login(login))
    with connect(first.port(), login), connect(second.port(), login) as client:
        assert first.port() != second.port()
        assert clean.billed()["count"] == 2
        first.destroy()
        assert say(client, "pwd").strip() == str(second.box / "root")
    assert [row["id"] for row in clean.billed()["instances"]] == [second.id]
    second.destroy()


def test_sshd_shows_the_key_that_onstart_installed_even_when_sshd_was_first(
    clean: MarketProcess, login: Path, tmp_path: Path
) -> None:
    key = tmp_path / "host"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    clean.set("/settings", sshd_first=True, gap_s=0.3)
    rented = rent(
        clean,
        own_login(login)
        + f"cat > $SELFHOST_ROOT/etc/ssh/ssh_host_ed25519_key <<'E'\n{key.read_text()}E\n"
        + "[ -s $SELFHOST_ROOT/run/sshd.pid ] && kill -HUP $(cat $SELFHOST_ROOT/run/sshd.pid)\n",
    )
    port = rented.port()

    def shown() -> str:
        scan = ["ssh-keyscan", "-T", "2", "-t", "ed25519", "-p", str(port), "127.0.0.1"]
        return subprocess.run(scan, capture_output=True, text=True).stdout

    image_key = until(shown).split()[2]
    bootstrap = key.with_suffix(".pub").read_text().split()[1]
    assert image_key != bootstrap
    until(lambda: bootstrap in shown())
    connect(port, login).close()
    rented.destroy()


def test_stop_ends_the_processes_and_keeps_the_disk_and_start_runs_onstart_again(
    clean: MarketProcess, login: Path
) -> None:
    rented = rent(clean, own_login(login) + "echo run >> ~/runs; echo $$ > ~/shell; setsid sleep 1000 &\n")
    connect(rented.port(), login).close()
    started = set(processes.boxes_of_processes()[str(rented.box)])
    assert started
    with clean.http(rented.key) as http:
        stopped = http.put(f"/api/v0/instances/{rented.id}/", json={"state": "stopped"})
    assert stopped.json()["success"] is True
    row = rented.row()
    assert (row["actual_status"], row["intended_status"], row["ports"]) == ("stopped", "stopped", {})
    assert not [pid for pid in started if alive(pid)]
    billed = clean.billed()["instances"][0]
    assert (billed["gpu_hour"], billed["disk_hour"] > 0) == (0, True)
    clean.sdk().start_instance(id=rented.id)
    connect(rented.port(), login).close()
    assert (rented.box / "root/runs").read_text() == "run\nrun\n"
    assert clean.billed()["instances"][0]["gpu_hour"] > 0
    rented.destroy()


def test_a_box_can_end_itself_with_its_own_key(clean: MarketProcess) -> None:
    rented = rent(
        clean,
        'curl -fsS -X DELETE -H "Authorization: Bearer $CONTAINER_API_KEY" -d "{}" '
        '"$SELFHOST_MARKET_URL/api/v0/instances/$CONTAINER_ID/"\nsleep 1000\n',
        env={"SELFHOST_MARKET_URL": clean.url},
    )
    until(lambda: clean.billed()["count"] == 0)
    until(lambda: not rented.box.exists())


def test_a_key_attached_later_reaches_the_box(clean: MarketProcess, login: Path) -> None:
    rented = rent(clean)
    rented.port()
    clean.sdk().attach_ssh(instance_id=rented.id, ssh_key=login.with_suffix(".pub").read_text())
    connect(rented.port(), login).close()
    rented.destroy()


@pytest.mark.parametrize("stage", ["null", "created", "loading"])
def test_a_boot_can_hang_in_any_stage_and_still_be_destroyed(clean: MarketProcess, stage: str) -> None:
    clean.set("/faults", fault="boot_stuck", stage=stage, calls=1)
    rented = rent(clean)
    status = None if stage == "null" else stage
    until(lambda: rented.row()["actual_status"] == status)
    billed = clean.billed()["instances"][0]
    assert (billed["gpu_hour"], billed["disk_hour"] > 0) == (0, True)
    assert rented.row()["status_msg"] == ("4c7d45f7c63c: Download complete" if stage == "loading" else None)
    rented.destroy()
    assert clean.billed()["count"] == 0


def test_a_slow_boot_goes_through_every_stage(clean: MarketProcess) -> None:
    clean.set("/faults", fault="slow_boot", null=0.3, created=0.3, loading=0.3, calls=1)
    rented = rent(clean)
    seen: list[str | None] = []

    def running() -> bool:
        status = rented.row()["actual_status"]
        if status not in seen:
            seen.append(status)
        return bool(status == "running")

    until(running)
    assert seen == [None, "created", "loading", "running"]
    rented.destroy()


@pytest.mark.parametrize("status", ["offline", "exited"])
def test_a_host_can_die_and_nothing_of_its_box_runs_on(clean: MarketProcess, login: Path, status: str) -> None:
    rented = rent(clean, own_login(login) + "setsid sleep 1000 &\n")
    connect(rented.port(), login).close()
    clean.set("/kill", instance=rented.id, status=status)
    assert rented.row()["actual_status"] == status
    assert str(rented.box) not in processes.boxes_of_processes()
    billed = clean.billed()
    assert (billed["count"], billed["instances"][0]["gpu_hour"]) == (1, 0), "it must still be destroyed"
    rented.destroy()


def test_a_host_can_die_by_itself_after_a_while(clean: MarketProcess) -> None:
    clean.set("/faults", fault="host_dies", after=0.2, status="exited", calls=1)
    rented = rent(clean)
    until(lambda: rented.row()["actual_status"] == "exited")
    rented.destroy()


def test_sshd_may_refuse_for_a_while_after_running(clean: MarketProcess, login: Path) -> None:
    clean.set("/faults", fault="ssh_refuses", seconds=1.5, calls=1)
    rented = rent(clean, own_login(login))
    port = rented.port()
    with pytest.raises(paramiko.ssh_exception.NoValidConnectionsError):
        connect(port, login, seconds=0)
    connect(port, login).close()
    rented.destroy()


def test_sshd_may_deny_every_key_for_a_while(clean: MarketProcess, login: Path) -> None:
    clean.set("/faults", fault="ssh_denies", seconds=1.5, calls=1)
    rented = rent(clean, own_login(login))
    port, log = rented.port(), rented.box / "var/log/sshd.log"
    until(lambda: log.exists() and "listening" in log.read_text())
    with pytest.raises(paramiko.AuthenticationException):
        connect(port, login, seconds=0)
    connect(port, login).close()
    rented.destroy()


@pytest.mark.parametrize("only", ["direct", "proxy"])
def test_one_endpoint_may_be_the_only_one_that_answers(clean: MarketProcess, login: Path, only: str) -> None:
    clean.set("/faults", fault="one_endpoint", only=only, calls=1)
    rented = rent(clean, own_login(login))
    row = until(lambda: (row := rented.row())["actual_status"] == "running" and row)
    ports = {"direct": int(row["ports"]["22/tcp"][0]["HostPort"]), "proxy": int(row["ssh_port"])}
    connect(ports.pop(only), login).close()
    (dead,) = ports.values()
    with pytest.raises(paramiko.ssh_exception.NoValidConnectionsError):
        connect(dead, login, seconds=0)
    rented.destroy()


def test_an_endpoint_may_move_when_the_container_starts_again(clean: MarketProcess, login: Path) -> None:
    rented = rent(clean, own_login(login))
    old = rented.port()
    connect(old, login).close()
    clean.set("/faults", fault="endpoint_moves", calls=1)
    clean.sdk().stop_instance(id=rented.id)
    clean.sdk().start_instance(id=rented.id)
    new = rented.port()
    assert new != old
    connect(new, login).close()
    with pytest.raises(paramiko.ssh_exception.NoValidConnectionsError):
        connect(old, login, seconds=0)
    rented.destroy()


def test_a_box_downloads_from_the_mirror_and_its_bytes_are_billed_and_seen(clean: MarketProcess) -> None:
    (clean.cache / "models/model.bin").write_bytes(bytes(2_000_000))
    rented = rent(clean, f"curl -s {clean.facts['mirror']}/models/model.bin | wc -c\n")
    until(lambda: "2000000" in rented.log())
    until(lambda: "eth0: 2000000 " in (rented.box / "net_dev").read_text())
    charges = clean.sdk().show_invoices_v1(charges=True, limit=100, latest_first=True)["results"]
    row = next(row for row in charges if row["source"] == f"instance-{rented.id}")
    down = next(item["amount"] for item in row["items"] if item["type"] == "bwd")
    assert down == pytest.approx(0.002 * rented.row()["inet_down_cost"])
    rented.destroy()


def test_a_market_that_is_terminated_destroys_its_boxes(
    start_market: Callable[..., MarketProcess], login: Path
) -> None:
    market = start_market()
    rented = rent(market, own_login(login) + "setsid sleep 1000 &\n")
    connect(rented.port(), login).close()
    pids = processes.boxes_of_processes()[str(rented.box)]
    market.process.terminate()
    assert market.process.wait(20) == 0
    assert not [pid for pid in pids if alive(pid)]
    assert list((market.state / "boxes").iterdir()) == []
    assert not (market.state / "market.json").exists()


def test_boxes_die_with_a_market_that_is_killed(start_market: Callable[..., MarketProcess], login: Path) -> None:
    market = start_market()
    rented = rent(market, own_login(login) + "setsid sleep 1000 &\n")
    connect(rented.port(), login).close()
    market.process.kill()
    market.process.wait()
    until(lambda: not rented.box.exists())
    assert str(rented.box) not in processes.boxes_of_processes()


def test_what_a_killed_market_and_supervisor_left_is_swept_by_the_next_market(
    start_market: Callable[..., MarketProcess], login: Path
) -> None:
    market = start_market()
    rented = rent(market, own_login(login) + "setsid sleep 1000 &\nsetsid env -i /bin/sleep 1001 &\n")
    with connect(rented.port(), login) as client:  # a session: its sshd has no environment left to know it by
        say(client, "true")
        supervisor = next(row["supervisor"] for row in market.control.get("/boxes").json())
        market.process.send_signal(signal.SIGSTOP)  # so that it cannot clean up after the supervisor
        os.kill(supervisor, signal.SIGKILL)
        market.process.kill()
        market.process.wait()
        until(lambda: not alive(supervisor))
        pids = processes.boxes_of_processes()[str(rented.box)]
        assert len(pids) >= 4
        follower = start_market()
        assert not [pid for pid in pids if alive(pid)]
    assert str(rented.box) not in processes.boxes_of_processes()
    assert not rented.box.exists()
    follower.close()


def test_a_second_market_on_the_same_state_directory_is_refused_and_sweeps_nothing(
    clean: MarketProcess, login: Path
) -> None:
    rented = rent(clean, own_login(login))
    command = [sys.executable, "-m", "selfhost_cli.sandbox.market", "--state", str(clean.state)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert refused.returncode == 2
    assert "already" in refused.stderr
    connect(rented.port(), login).close()
    rented.destroy()


def test_another_markets_boxes_are_not_swept(clean: MarketProcess, login: Path, start_market: Any) -> None:
    rented = rent(clean, own_login(login))
    with connect(rented.port(), login) as client:
        start_market().close()
        assert say(client, "echo there") == "there\n"
    rented.destroy()


ELSEWHERE = """
from pathlib import Path
from selfhost_cli.sandbox import processes
assert not Path({box!r}).exists()
processes.sweep(Path("/tmp/boxes"))
"""


@pytest.mark.skipif(not processes.can_have_private_mounts(Path("/nowhere")), reason="needs root, and mounts of its own")
def test_a_box_that_a_sweeping_market_cannot_see_is_left_alone(clean: MarketProcess, login: Path) -> None:
    """As that of a market in a container, or of a demo that has /tmp for itself."""
    rented = rent(clean, own_login(login))
    with connect(rented.port(), login) as client:
        hidden = ["unshare", "-m", "sh", "-c", 'mount -n -t tmpfs none "$0" && exec "$@"', rented.box.parent]
        subprocess.run([*hidden, sys.executable, "-c", ELSEWHERE.format(box=str(rented.box))], check=True, timeout=30)
        assert say(client, "echo there") == "there\n"
    rented.destroy()


def test_a_market_ends_when_nothing_is_rented_and_nobody_asks(start_market: Callable[..., MarketProcess]) -> None:
    market = start_market("--idle-exit", "0.4")
    market.set("/faults", fault="boot_stuck", stage="null")
    rented = rent(market)
    with pytest.raises(subprocess.TimeoutExpired):
        market.process.wait(1.2)  # nobody asks, but something is rented
    market.sdk().destroy_instance(id=rented.id)
    assert market.process.wait(20) == 0
    assert not (market.state / "market.json").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become an ordinary user")
def test_an_ordinary_user_can_run_market_and_boxes(tmp_path: Path, login: Path) -> None:
    """As `nobody`, with the machine's Python: no aiohttp there, so only the box."""
    nobody = pwd.getpwnam("nobody")
    python = image.python_path()
    folder = Path("/tmp") / f"selfhost-test-{os.getpid()}"
    folder.mkdir(mode=0o700)
    try:
        package = folder / "selfhost_cli"
        source = Path(str(image.__file__)).parent.parent
        for module in ("__init__.py", "errors.py", *(f"sandbox/{name}.py" for name in _BOX_MODULES)):
            target = package / module
            target.parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(source / module, target)
        (folder / "login.pub").write_text(login.with_suffix(".pub").read_text())
        (folder / "run.py").write_text(_AS_NOBODY)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        process = subprocess.Popen(
            [python, "-B", "run.py"],
            cwd=folder,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        box, port = process.stdout.readline().split()
        try:
            with connect(int(port), login) as client:
                assert say(client, "echo ~; pwd; whoami").split() == [f"{box}/root"] * 2 + ["root"]
                with client.open_sftp() as sftp:
                    assert sftp.normalize(".") == f"{box}/root"
                shell = client.invoke_shell()
                shell.send(b"exit 7\n")
                assert shell.recv_exit_status() == 7
                inside = int(say(client, "setsid sleep 1000 >/dev/null 2>&1 & echo $!"))
                assert alive(inside)
                assert os.stat(f"/proc/{inside}").st_uid == nobody.pw_uid
        finally:
            process.terminate()
            process.wait(20)
            process.stdout.close()
        until(lambda: not alive(inside))
        assert not Path(box).exists()
    finally:
        shutil.rmtree(folder)


_BOX_MODULES = ("__init__", "box", "image", "processes")
_AS_NOBODY = """
import os, socket, sys
from pathlib import Path
from selfhost_cli.sandbox import image

box = Path.cwd() / "boxes/box-1"
image.check(box.parent)
reserved = socket.socket()
reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
reserved.bind(("127.0.0.1", 0))
port = reserved.getsockname()[1]
image.build(box, image.BoxConfig(1, port, authorized_keys=(Path("login.pub").read_text().strip(),)))
print(box, port, flush=True)
os.set_inheritable(reserved.fileno(), True)
os.execv(sys.executable, [sys.executable, "-B", "-m", "selfhost_cli.sandbox.box", str(box)])
"""
