"""Records to start from."""

from __future__ import annotations

from dataclasses import replace

from selfhost_cli.model import Caps, Rental, State


def make_rental(label: str = "selfhost-test-1", **changes: object) -> Rental:
    """A rental whose intent was just written."""
    rental = Rental(
        label=label,
        state=State.CREATING,
        created_at=1_795_000_000.0,
        offer_id=1001,
        machine_id=1,
        gpu="RTX 4090",
        place="Quebec, CA",
        dph_base=0.30,
        dph_total=0.31,
        storage_dph=0.01,
        down_per_gb=0.002,
        up_per_gb=0.004,
        model="qwen2.5-coder-0.5b",
        engine="llamacpp",
        context=32_768,
        caps=Caps(),
        host_key="ssh-ed25519 AAAA",
        box_token="box-token",
    )
    return replace(rental, **changes)  # type: ignore[arg-type]
