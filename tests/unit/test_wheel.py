"""What somebody gets who installs the package instead of cloning the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def shipped() -> set[str]:
    """Every file of the package, those behind the link to templates/ too."""
    found = set()
    for folder, folders, files in os.walk(ROOT / "selfhost_cli", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in files}
    return found


@pytest.mark.long
def test_the_wheel_holds_the_whole_package_with_its_scripts_and_data(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling, which builds the wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("selfhost_cli-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped()
    assert {f"selfhost_cli/templates/{path.name}" for path in (ROOT / "templates").glob("*.*")} <= names
    assert {
        f"selfhost_cli/sandbox/{name}" for name in ("demo-model.txt", "Modelfile", "offer.json", "instance.json")
    } <= names
