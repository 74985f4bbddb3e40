"""A market in memory: `providers.Provider` with the faults that `lifecycle` must survive. Tested in tests/contract."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from selfhost_cli.errors import AnswerLost, MarketError, MarketUnreachable, NoCredit, OfferGone, TooOften
from selfhost_cli.model import Account, BoxSpec, BoxState, Charges, Endpoint, Instance, Need, Offer
from tests.fakes.clock import FakeClock


def make_offer(number: int = 1, **changes: object) -> Offer:
    """A good RTX 4090, dearer with its number."""
    values: dict[str, object] = {
        "id": 1000 + number,
        "machine_id": number,
        "host_id": number,
        "gpu": "RTX 4090",
        "num_gpus": 1,
        "gpu_ram_mb": 24_564,
        "ram_mb": 64_000,
        "disk_gb": 500.0,
        "dph_base": 0.30 + number / 100,
        "dph_total": 0.31 + number / 100,
        "storage_dph": 0.01,
        "down_per_gb": 0.002,
        "up_per_gb": 0.004,
        "inet_down_mbps": 900.0,
        "inet_up_mbps": 900.0,
        "reliability": 0.995,
        "verified": True,
        "rentable": True,
        "cuda": 12.8,
        "direct_ports": 10,
        "duration_s": 1e6,
        "place": "Quebec, CA",
    }
    return Offer(**(values | changes))  # type: ignore[arg-type]


@dataclass
class FakeMarket:
    """Boxes run at once. Switches: each counts down as it takes effect."""

    clock: FakeClock
    stock: list[Offer] = field(default_factory=lambda: [make_offer(number) for number in range(1, 6)])
    credit: float = 20.0
    account_id: str = "1"
    boxes: dict[int, Instance] = field(default_factory=dict)
    specs: dict[str, BoxSpec] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    creates: int = 0
    gone: int = 0
    lost_with_effect: int = 0
    lost_without_effect: int = 0
    silences: list[float] = field(default_factory=list)
    """Each of so many creates is refused, with the seconds of silence that are wanted."""
    unreachable: int = 0
    undead: int = 0
    immortal: set[int] = field(default_factory=set)
    listing_lag: float = 0.0
    hidden_until: dict[int, float] = field(default_factory=dict)
    ghosts: dict[int, tuple[Instance, float]] = field(default_factory=dict)
    state: BoxState = BoxState.RUNNING
    status: str = ""
    charged: float | None = None
    """What a box costs, where that is not what its offer said."""
    charged_for: dict[int, Charges] = field(default_factory=dict)
    """The figures that it has."""
    charges_asked: int = 0
    before: Callable[[str], None] = lambda verb: None

    def account(self) -> Account:
        self._ask("account")
        return Account(self.account_id, self.credit)

    def offers(self, need: Need) -> list[Offer]:
        self._ask("offers")
        return list(self.stock)

    def create(self, offer: Offer, spec: BoxSpec, sending: Callable[[], None] = lambda: None) -> int:
        self.before("create")
        sending()
        self.creates += 1
        if self.credit <= 0:
            raise NoCredit("the account cannot pay")
        if self.silences:
            raise TooOften("we ask too often", seconds=self.silences.pop(0))
        if self._take("gone"):
            raise OfferGone(f"offer {offer.id} is gone")
        if self._take("lost_without_effect"):
            raise AnswerLost("the answer was lost")
        number = 5000 + self.creates
        ssh = Endpoint("192.0.2.1", 40_000 + self.creates)
        self.boxes[number] = Instance(
            number, spec.label, self.state, self.status or self.state, "", offer.machine_id, offer.gpu,
            self.charged or offer.dph_total, self.clock.time(), ssh, None,
        )  # fmt: skip
        self.specs[spec.label] = spec
        self.hidden_until[number] = self.clock.time() + self.listing_lag
        if self._take("lost_with_effect"):
            raise AnswerLost("the answer was lost")
        return number

    def instances(self, label_prefix: str, ids: Collection[int] = ()) -> list[Instance]:
        self._ask("instances")
        now = self.clock.time()
        rows = [box for box in self.boxes.values() if self.hidden_until.get(box.id, 0) <= now]
        rows += [box for box, until in self.ghosts.values() if until > now]
        return [box for box in rows if box.id in ids or box.label.startswith(label_prefix)]

    def get(self, instance_id: int) -> Instance | None:
        self._ask("get")
        return self.boxes.get(instance_id)

    def destroy(self, instance_id: int) -> None:
        self._ask("destroy")
        if self._take("undead"):
            return
        if instance_id in self.immortal:
            raise MarketError(f"box {instance_id} cannot be destroyed")
        if box := self.boxes.pop(instance_id, None):
            self.ghosts[instance_id] = (box, self.clock.time() + self.listing_lag)

    def register_key(self, public_key: str) -> None:
        self._ask("register_key")
        if public_key not in self.keys:
            self.keys.append(public_key)

    def attach_key(self, instance_id: int, public_key: str) -> None:
        self._ask("attach_key")

    def charges(self, ids: Collection[int], since: float) -> dict[int, Charges]:
        self._ask("charges")
        self.charges_asked += 1
        return {number: self.charged_for[number] for number in ids if number in self.charged_for}

    def _ask(self, verb: str) -> None:
        self.before(verb)
        if self._take("unreachable"):
            raise MarketUnreachable("the market cannot be reached")

    def _take(self, switch: str) -> bool:
        left = int(getattr(self, switch))
        if left:
            setattr(self, switch, left - 1)
        return bool(left)
