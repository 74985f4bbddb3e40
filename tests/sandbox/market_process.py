"""A market in its own process, as the demo starts it, and what tests ask of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from vastai import VastAI

from tests.fakes.clock import FakeClock
from tests.waiting import until


class MarketProcess:
    """`python -m selfhost_cli.sandbox.market`; `state` survives it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.state = folder / "state"
        self.cache = folder / "cache"
        for name in ("models", "wheels"):
            (self.cache / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "selfhost_cli.sandbox.market", "--state", str(self.state)]
        command += ["--cache", str(self.cache), "--fast", *arguments]
        self.errors = folder / "market.err"
        # Warnings of asyncio (something never awaited, a transport left open) become visible in what it prints.
        environment = os.environ | {"PYTHONWARNINGS": "always"}
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors, env=environment)
        announced = self.state / "market.json"

        def facts_of_this_one() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.errors.read_text()
            # One that was killed leaves its file behind.
            facts: dict[str, Any] = json.loads(announced.read_text()) if announced.exists() else {}
            return facts if facts.get("pid") == self.process.pid else None

        facts = until(facts_of_this_one)
        assert facts is not None
        self.facts = facts
        self.url: str = facts["url"]
        self.control = httpx.Client(
            base_url=f"{self.url}/control",
            headers={"Authorization": f"Bearer {facts['control_token']}"},
            trust_env=False,
            timeout=30,
        )

    def sdk(self, key: str | None = None) -> Any:
        return VastAI(api_key=key or self.facts["api_key"], server_url=self.url, retry=1)

    def http(self, key: str | None = None) -> httpx.Client:
        """Plain HTTP, as curl in a box does it; no key: no header."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30)

    def billed(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.control.get("/billed").json()
        return answer

    def set(self, path: str, **values: Any) -> Any:
        answer = self.control.post(path, json=values)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def box(self, instance: int) -> Path:
        return self.state / "boxes" / f"box-{instance}"

    def asked(self, *methods: str) -> list[dict[str, Any]]:
        """What was asked, by these methods or any."""
        rows: list[dict[str, Any]] = self.control.get("/requests").json()
        return [row for row in rows if not methods or row["method"] in methods]

    def advance(self, seconds: float) -> None:
        """Let time pass on the market's clock."""
        self.set("/clock", advance=seconds)

    def destroy_all(self) -> None:
        sdk = self.sdk()
        for row in self.billed()["instances"]:
            sdk.destroy_instance(id=row["id"])

    def close(self) -> None:
        """End it, with everything it rented out; nothing is billed, nothing is left, nothing was said."""
        if self.process.poll() is None:
            self.destroy_all()
            assert self.billed()["count"] == 0
            self.set("/shutdown")
            assert self.process.wait(20) == 0
        self.control.close()
        assert list((self.state / "boxes").glob("*")) == []
        said = self.errors.read_text()
        assert not said, said


class SharedClock(FakeClock):
    """Starts at the market's time; whoever sleeps on it makes time pass for the market, too."""

    def __init__(self, market: MarketProcess) -> None:
        super().__init__(market.set("/clock")["now"])
        self._market = market

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self._market.advance(seconds)
