"""The real Claude Code with all of its prompt, before a front with a cache: what makes it ask the engine again."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from selfhost_cli.proxy.cache.counters import total
from selfhost_cli.proxy.cache.stores.local import LocalStore
from selfhost_cli.proxy.front import Upstream
from selfhost_cli.sandbox.assets import Assets
from tests.e2e.stage import git, talking
from tests.proxy.cache.kit import FRONT, laptop
from tests.proxy.kit import TOKEN, LlamaStub, asynchronous, proxied

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("ready")]

CONTEXT = 200_000


@asynchronous
async def test_the_same_question_in_the_same_state_of_a_repository_is_answered_from_the_cache_and_no_other(
    downloads: Assets, tmp_path: Path
) -> None:
    """Another model, and another file of the same name, are in tests/proxy/cache/test_key.py."""
    engine, repo = LlamaStub(n_ctx=CONTEXT), tmp_path / "repo"
    git(repo, "init")
    (repo / "note.txt").write_text("one\n")
    git(repo, "add", ".")
    git(repo, "commit", "--message=one")
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(proxied(engine, tmp_path, digest="d1"))
        store = LocalStore(tmp_path / "answers.sqlite3", 2**24)
        front = await stack.enter_async_context(laptop(Upstream(box.url, TOKEN, "rental-1"), store))

        async def engine_requests(*words: str) -> int:
            before = len(engine.asked)
            words = ("-p", "What is in note.txt?", *words)
            async with talking(downloads.claude, front.url, repo, *words, token=FRONT, context=CONTEXT) as talk:
                assert (await talk).strip() == "Hello there"
            await front.settled()
            return len(engine.asked) - before

        assert await engine_requests() == 1
        assert len(str(engine.asked[0])) > 50_000, "that is not all of its prompt"
        assert await engine_requests() == 0

        (repo / "note.txt").write_text("two\n")
        assert await engine_requests() == 1, "a dirty tree"
        git(repo, "commit", "--all", "--message=two")
        assert await engine_requests() == 1, "another commit"
        assert await engine_requests() == 0
        assert await engine_requests("--append-system-prompt", "Be brief.") == 1, "another system prompt"
        assert await engine_requests("--disallowedTools", "Bash") == 1, "other tools"
        counted = total((await front.counters.totals()).values())
    assert (counted.hits, counted.misses, counted.bypasses) == (2, 5, 0)
