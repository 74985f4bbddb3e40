"""Reads pytest's JUnit report, lists what was skipped and why, and closes with the counts: `summary.py REPORT`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main(report: Path) -> None:
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None and case not in failed]
    passed = len(cases) - len(failed) - len(skipped)
    lines = [""]
    if skipped:
        lines.append("Skipped is not passed. These did not run:")
        lines += [f"  {_name(case)}: {_reason(case)}" for case in skipped]
    lines.append(f"{passed + len(failed)} tests ran")
    lines.append(f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped")
    sys.stdout.write("\n".join(lines) + "\n")


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("tests.")


def _reason(case: ElementTree.Element) -> str:
    skipped = case.find("skipped")
    return (skipped.get("message") or "no reason given") if skipped is not None else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
