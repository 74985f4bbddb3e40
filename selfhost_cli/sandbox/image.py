"""What a box's directory consists of: home, tools, sshd's files. No processes are left running here.

root/            HOME (0700): .ssh/authorized_keys, onstart.sh
bin/             the whole PATH: an explicit list of ordinary tools, and a refusing apt-get
etc/             passwd, group, shadow (libnss-wrapper), ssh/ (sshd_config, host keys, banner)
run/sshd.pid     var/log/{onstart,sshd,box}.log     tmp/     net_dev     box.json     lock
"""

from __future__ import annotations

import functools
import glob
import json
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from selfhost_cli.errors import NotSetUp
from selfhost_cli.sandbox import processes

TOOLS = """
[ awk base64 basename bash bunzip2 bzip2 cat chgrp chmod chown cksum cmp comm cp curl cut date dd df diff dirname du
echo egrep env expand expr false fgrep find flock fmt fold free getent grep groups gunzip gzip head hostname id install
ionice join kill less link ln logname ls lscpu md5sum mkdir mkfifo mknod mktemp more mv nice nl nohup nproc numfmt od
openssl paste patch printenv printf ps pwd readlink realpath rm rmdir sed seq setsid sh sha1sum sha256sum sha512sum
shred shuf sleep sort split ssh-keygen stat stdbuf stty sum sync tac tail tar taskset tee test timeout touch tr true
truncate tsort tty uname uniq unlink unzip uptime wc wget which who whoami xargs xz yes zcat zstd
"""
"""The tools on a box's PATH that this machine has.

Absent on purpose: nvidia-smi, systemctl, ollama (unless BoxConfig names one); pkill and killall, which would reach the
user's own processes.
"""

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_BANNER = """\
Welcome to vast.ai. If authentication fails, try again after a few seconds, and double check your ssh key.
Have fun!
"""

_NET_DEV = """\
Inter-|   Receive                            |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo: 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
  eth0: {received} 0 0 0 0 0 0 0 {sent} 0 0 0 0 0 0 0
"""

_SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey "{box}/etc/ssh/ssh_host_ed25519_key"
HostKey "{box}/etc/ssh/ssh_host_ecdsa_key"
PidFile "{box}/run/sshd.pid"
AuthorizedKeysFile {keys}
AuthenticationMethods publickey
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes yes
PrintMotd no
PrintLastLog no
PermitUserRC no
PermitUserEnvironment no
X11Forwarding no
AllowAgentForwarding no
AllowTcpForwarding yes
GatewayPorts no
MaxSessions 64
MaxStartups 64
Banner "{box}/etc/ssh/banner"
Subsystem sftp internal-sftp
SetEnv {environment}
"""


@dataclass(frozen=True)
class BoxConfig:
    """What the market tells a box's supervisor; `box.json` (0600: it holds the box's own key)."""

    id: int
    port: int
    env: dict[str, str] = field(default_factory=dict, repr=False)
    onstart: str = field(default="", repr=False)
    authorized_keys: tuple[str, ...] = ()
    sshd_first: bool = False
    gap_s: float = 2.0
    """sshd first: how long the image's own sshd is up before onstart. Else: how long onstart may hold sshd back."""
    sshd_delay_s: float = 0.0
    deny_s: float = 0.0
    """For so long sshd accepts no key."""
    market_pid: int = 0
    """The supervisor ends the box when this process, its parent, ends; 0: no such parent."""
    ollama: str = ""
    """The program that is `ollama` on its PATH; none when empty."""

    def save(self, box: Path) -> None:
        write(box / "box.json", json.dumps(asdict(self)), 0o600)

    @classmethod
    def load(cls, box: Path) -> BoxConfig:
        values = json.loads((box / "box.json").read_text())
        return cls(**{**values, "authorized_keys": tuple(values["authorized_keys"])})


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file atomically, with that mode from its first byte."""
    part = path.with_name(path.name + ".new")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(part, path)


@functools.cache
def sshd_path() -> str:
    """Absolute, because sshd starts itself again with argv[0]. Raises NotSetUp."""
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")
    if not found:
        raise NotSetUp("sshd is not installed", "apt-get install -y openssh-server")
    return os.path.abspath(found)


@functools.cache
def nss_wrapper_path() -> str:
    """Raises NotSetUp."""
    patterns = ("/usr/lib/*-linux-gnu*/", "/usr/lib64/", "/usr/lib/", "/usr/local/lib/", "/usr/local/lib64/")
    for pattern in patterns:
        for found in sorted(glob.glob(pattern + "libnss_wrapper.so*")):
            return found
    raise NotSetUp("libnss_wrapper is not installed", "apt-get install -y libnss-wrapper")


@functools.cache
def python_path() -> str:
    """A Python >= 3.11 that can make virtual environments: the machine's, else the one under ours. Raises NotSetUp."""
    check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    base = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    for candidate in ("/usr/bin/python3", str(base)):
        try:
            if subprocess.run([candidate, "-Ic", check], capture_output=True, timeout=30).returncode == 0:
                return candidate
        except (OSError, subprocess.TimeoutExpired):
            continue
    raise NotSetUp("no Python >= 3.11 with venv and ensurepip", "apt-get install -y python3-venv")


def check(boxes: Path) -> None:
    """Can boxes run here? Raises NotSetUp with the one line that helps."""
    sshd_path()
    nss_wrapper_path()
    python_path()
    if shutil.which("ssh-keygen") is None:
        raise NotSetUp("ssh-keygen is not installed", "apt-get install -y openssh-client")
    if not processes.privsep_ready() and not processes.can_have_private_mounts(boxes):
        raise NotSetUp("sshd, started by root, needs the directory /run/sshd", "mkdir -p -m 0755 /run/sshd")


def environment(box: Path) -> dict[str, str]:
    """The clean environment of everything that runs in a box; nothing of the laptop's leaks in."""
    variables = {
        "HOME": f"{box}/root",
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": "/bin/bash",
        "PATH": f"{box}/bin",
        "LANG": "C.UTF-8",
        "TMPDIR": f"{box}/tmp",
        "LD_PRELOAD": nss_wrapper_path(),
        "NSS_WRAPPER_PASSWD": f"{box}/etc/passwd",
        "NSS_WRAPPER_GROUP": f"{box}/etc/group",
        "NSS_WRAPPER_SHADOW": f"{box}/etc/shadow",
        "PIP_CONFIG_FILE": "/dev/null",
        "SELFHOST_ROOT": str(box),
        "SELFHOST_NET_DEV": f"{box}/net_dev",
        "SELFHOST_SIMULATED_GPU": "1",
        processes.MARKER: str(box),
    }
    interpreter = Path(os.readlink(box / "etc/python"))
    if os.access(interpreter.parent.parent / "lib", os.W_OK):
        # It may have no compiled standard library, which it would then write where it is. (Making environments
        # takes a second longer so.)
        variables["PYTHONPYCACHEPREFIX"] = f"{box}/var/cache/python"
    return variables


def build(box: Path, config: BoxConfig) -> None:
    """Make the container: directories, tools, users, the account's keys, the image's own host keys."""
    box.mkdir(mode=0o700, parents=True)
    for folder in ("bin", "etc/ssh", "run", "tmp", "var/log", "var/cache"):
        (box / folder).mkdir(parents=True)
    for folder in ("root", "root/.ssh"):
        (box / folder).mkdir(mode=0o700)
    keys = "".join(f"{key}\n" for key in config.authorized_keys)
    write(box / "root/.ssh/authorized_keys", keys, 0o600)
    write(box / "root/onstart.sh", config.onstart, 0o700)
    # A login shell would read the machine's /etc/profile, and find the machine's tools.
    write(box / "root/.profile", f"PATH='{box}/bin'\n")
    write_net_dev(box, 0, 0)
    _tools(box)
    if config.ollama:
        (box / "bin/ollama").symlink_to(config.ollama)
    _users(box)
    _host_keys(box)
    config.save(box)


def write_net_dev(box: Path, received: int, sent: int) -> None:
    """A file of the shape of /proc/net/dev with the bytes the mirror served to this box."""
    write(box / "net_dev", _NET_DEV.format(received=received, sent=sent))


def _script(path: Path, text: str) -> None:
    write(path, text, 0o755)


def _tools(box: Path) -> None:
    for tool in TOOLS.split():
        found = shutil.which(tool, path=_SYSTEM_PATH)
        if found:
            (box / "bin" / tool).symlink_to(found)
    # Not a link: an environment made through one would depend on the box's bin directory.
    (box / "etc/python").symlink_to(python_path())
    _script(box / "bin/python3", f'#!/bin/sh\nexec {python_path()} "$@"\n')
    refusal = '#!/bin/sh\necho "${0##*/}: refused: a box of the sandbox does not change this machine" >&2\nexit 100\n'
    for tool in ("apt-get", "apt", "dpkg"):
        _script(box / "bin" / tool, refusal)
    # bash without the dash in argv[0]: no login shell, so no /etc/profile.
    _script(box / "etc/shell", '#!/bin/bash\nexec /bin/bash "$@"\n')


def _users(box: Path) -> None:
    """root is whoever we are, at home in the box; nothing of the machine's users is seen."""
    uid, gid = os.getuid(), os.getgid()
    nobody = 65534
    try:
        sshd = pwd.getpwnam("sshd").pw_uid
    except KeyError:
        sshd = nobody
    users = [f"root:x:{uid}:{gid}:root:{box}/root:{box}/etc/shell"]
    users += [f"sshd:x:{sshd}:{nobody}:sshd:/run/sshd:/usr/sbin/nologin"]
    write(box / "etc/passwd", "\n".join(users) + "\n")
    write(box / "etc/group", f"root:x:{gid}:\nnogroup:x:{nobody}:\ntty:x:{_terminal_group()}:\n")
    # Without it sshd would refuse a root whom the machine's own /etc/shadow locks (Ubuntu's does).
    write(box / "etc/shadow", "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n", 0o600)


def _terminal_group() -> int:
    """The group that new terminals have here: sshd without root could not give them another."""
    control, terminal = os.openpty()
    try:
        return os.fstat(terminal).st_gid
    finally:
        os.close(control)
        os.close(terminal)


def _host_keys(box: Path) -> None:
    """The image's own, which onstart may replace."""
    for kind in ("ed25519", "ecdsa"):
        command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "root@image"]
        key = box / f"etc/ssh/ssh_host_{kind}_key"
        subprocess.run([*command, "-f", str(key)], check=True, stdin=subprocess.DEVNULL, capture_output=True)


def configure_sshd(box: Path, port: int, *, deny: bool = False) -> None:
    """Write sshd_config; what `environment` says, as this process sees the machine, is what its sessions get."""
    keys = "none" if deny else f'"{box}/root/.ssh/authorized_keys"'
    write(box / "etc/ssh/banner", _BANNER)
    sessions = " ".join(f'"{name}={value}"' for name, value in environment(box).items())
    write(box / "etc/ssh/sshd_config", _SSHD_CONFIG.format(port=port, box=box, keys=keys, environment=sessions))
