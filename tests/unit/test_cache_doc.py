"""docs/cache.md says what the cache says and what its Redis has to allow."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cache.md").read_text()
CACHE = ROOT / "selfhost_cli" / "proxy" / "cache"


def test_the_user_for_redis_has_the_rights_that_are_tested_to_be_enough() -> None:
    tested = (ROOT / "tests" / "proxy" / "cache" / "test_shared_store.py").read_text()
    (rights,) = re.findall(r"just_the_rights.*?rights = \((.*?)\)", tested, re.DOTALL)
    (line,) = re.findall(r"^ACL SETUSER cache on >PASSWORD (.*)$", PAGE, re.MULTILINE)
    assert line.split() == re.findall(r'"(\S+)"', rights)


def test_every_kind_of_hit_is_explained() -> None:
    kinds = re.findall(r'f"\{HIT\};([^"]+)"', (CACHE / "cache.py").read_text())
    assert len(kinds) == 2
    assert [kind for kind in kinds if f"`hit;{kind}`" not in PAGE] == []


def test_every_reason_for_a_bypass_is_explained() -> None:
    source = (CACHE / "cache.py").read_text() + (CACHE / "rules.py").read_text()
    reasons = re.findall(r'"(no temperature|temperature|not a request|not known what is served|no-store)"', source)
    assert len(set(reasons)) == 5
    assert [reason for reason in {*reasons, "no-cache"} if f"`bypass;{reason}`" not in PAGE] == []
