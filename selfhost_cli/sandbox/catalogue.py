"""What the market sells: machines, the offers made of them, the filters and prices of a search. No I/O.

Rows are plain dicts with the keys of the real market's answers (`offer.json` holds one whole row), because the row is
the contract here. The same seed gives the same offers with the same ids.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from selfhost_cli.sandbox.billing import disk_hour

Row = dict[str, Any]

MAX_ROWS = 64
"""The market never answers with more, whatever `limit` says."""

_NOT_FILTERS = {"order", "type", "limit", "allocated_storage", "disable_bundling", "owner", "q", "select_cols"}
_TYPES = {"on-demand": False, "ask": False, "reserved": False, "bid": True, "interruptible": True}
_DAY = 86_400


class BadQuery(Exception):
    """The search makes no sense to the market: 400 bad_request."""


@dataclass(frozen=True)
class _Gpu:
    ram_mb: int
    compute_cap: int
    bandwidth: float
    tflops: float
    dlperf: float
    watts: float


_GPUS = {
    "RTX 4090": _Gpu(24564, 890, 858.9, 82.97, 106.6, 450.0),
    "RTX 4090 D": _Gpu(24564, 890, 858.9, 73.54, 91.2, 425.0),
    "RTX 3090": _Gpu(24576, 860, 832.3, 35.59, 55.4, 350.0),
    "RTX 5090": _Gpu(32607, 1200, 1522.4, 104.8, 178.9, 575.0),
    "RTX 3060": _Gpu(12288, 860, 324.0, 12.74, 21.5, 170.0),
    "A100 SXM4": _Gpu(81920, 800, 1767.6, 19.49, 121.8, 400.0),
    "H100 SXM": _Gpu(81559, 900, 2671.1, 66.91, 301.4, 700.0),
}


@dataclass(frozen=True)
class _Machine:
    """One physical machine. `price` in $/h per GPU, `disk` in $/GB/month, traffic in $/TB, `sizes` = GPUs per offer."""

    gpu: str
    place: str
    price: float
    down: float
    up: float
    reliability: float
    down_tb: float = 2.0
    up_tb: float = 4.0
    ram_gb: int = 128
    disk_gb: float = 900.0
    disk: float = 0.15
    verified: str = "verified"
    datacenter: bool = False
    cuda: float = 13.0
    ports: int = 200
    days: float = 60.0
    sizes: tuple[int, ...] = (1,)


_MACHINES = (
    _Machine("RTX 4090", "Quebec, CA", 0.300, 905, 877, 0.9970, ram_gb=257, sizes=(1, 1, 2, 4)),
    _Machine("RTX 4090", "Texas, US", 0.339, 2710, 1830, 0.9987, ram_gb=515, sizes=(1, 2, 4, 8), datacenter=True),
    _Machine("RTX 4090", "Oregon, US", 0.349, 1650, 940, 0.9991, down_tb=3.0, up_tb=3.0),
    _Machine("RTX 4090", "Sweden, SE", 0.312, 840, 790, 0.9962, down_tb=3.5, disk=0.2),
    _Machine("RTX 4090", "Norway, NO", 0.361, 4230, 3980, 0.9994, down_tb=1.0, up_tb=1.0, datacenter=True),
    _Machine("RTX 4090", "Germany, DE", 0.402, 6120, 5010, 0.9989, down_tb=0.0, up_tb=0.0, disk=0.3),
    _Machine("RTX 4090", "Iceland, IS", 0.287, 512, 488, 0.9944, down_tb=4.0, disk_gb=420),
    _Machine("RTX 4090", "Bulgaria, BG", 0.251, 690, 610, 0.9910, down_tb=52.0, up_tb=52.0),
    _Machine("RTX 4090", "Czechia, CZ", 0.276, 455, 210, 0.9873, ram_gb=64),
    _Machine("RTX 4090", "Poland, PL", 0.268, 388, 95, 0.9826, ram_gb=64, disk_gb=210),
    _Machine("RTX 4090", "South Korea, KR", 0.295, 733, 701, 0.9951, down_tb=12.0, up_tb=12.0),
    _Machine("RTX 4090", "Vietnam, VN", 0.240, 320, 160, 0.9702, down_tb=9.0),
    _Machine("RTX 4090", "China, CN", 0.233, 410, 88, 0.9908, down_tb=20.0, up_tb=20.0),
    _Machine("RTX 4090", "Spain, ES", 0.262, 118, 64, 0.9932),
    _Machine("RTX 4090", "Taiwan, TW", 0.281, 610, 540, 0.9955, ram_gb=24),
    _Machine("RTX 4090", "Hungary, HU", 0.259, 577, 402, 0.9921, disk_gb=31),
    _Machine("RTX 4090", "United Kingdom, GB", 0.308, 880, 120, 0.9969, cuda=12.2),
    _Machine("RTX 4090", "France, FR", 0.316, 930, 870, 0.9976, ports=0),
    _Machine("RTX 4090", "Ohio, US", 0.229, 790, 650, 0.9946, verified="unverified"),
    _Machine("RTX 4090", "Romania, RO", 0.199, 940, 930, 0.9120, verified="deverified"),
    _Machine("RTX 4090", "Japan, JP", 0.372, 1210, 1190, 0.9983, days=0.15),
    _Machine("RTX 4090", "California, US", 0.890, 8400, 7900, 0.9996, datacenter=True),
    _Machine("RTX 4090 D", "Hong Kong, HK", 0.221, 1320, 990, 0.9972),
    _Machine("RTX 4090 D", "Shandong, CN", 0.204, 870, 420, 0.9938, down_tb=15.0),
    _Machine("RTX 3090", "Utah, US", 0.148, 640, 600, 0.9961, sizes=(1, 2)),
    _Machine("RTX 3090", "Italy, IT", 0.139, 520, 190, 0.9937),
    _Machine("RTX 5090", "Nevada, US", 0.448, 3150, 2870, 0.9985, sizes=(1, 2)),
    _Machine("RTX 5090", "Netherlands, NL", 0.512, 5050, 4400, 0.9992, down_tb=1.0, datacenter=True),
    _Machine("RTX 3060", "Ukraine, UA", 0.048, 310, 240, 0.9902),
    _Machine("A100 SXM4", "Virginia, US", 0.782, 7200, 6900, 0.9994, ram_gb=1031, datacenter=True),
    _Machine("H100 SXM", "Finland, FI", 1.870, 9100, 8800, 0.9997, ram_gb=1547, datacenter=True),
)


def template(name: str) -> Row:
    """A whole row as the real market sends it: "offer" or "instance"."""
    text = resources.files("selfhost_cli.sandbox").joinpath(f"{name}.json").read_text()
    row: Row = json.loads(text)
    return row


class Catalogue:
    """The offers, and which of them are taken."""

    def __init__(self, seed: int, now: float) -> None:
        chance = random.Random(seed)
        ids = iter(sorted(chance.sample(range(21_000_000, 49_000_000), 200)))
        self._rows: dict[int, Row] = {}
        self._gone: set[int] = set()
        blank = template("offer")
        for number, machine in enumerate(_MACHINES):
            machine_id, host_id = 12_000 + 137 * number + chance.randrange(100), chance.randrange(50_000, 190_000)
            for size in machine.sizes:
                row = _row(blank, machine, size, now, chance)
                row |= {"machine_id": machine_id, "host_id": host_id}
                row["id"] = row["ask_contract_id"] = next(ids)
                row["avail_vol_ask_id"] = row["id"] + 1
                self._rows[row["id"]] = row

    def get(self, offer: int) -> Row | None:
        """The row as it is without a search (no disk in its price); None for an id that never was."""
        return self._rows.get(offer)

    def available(self, offer: int) -> bool:
        return offer in self._rows and offer not in self._gone and not self._rows[offer]["rented"]

    def set_rented(self, offer: int, rented: bool) -> None:
        """By us: out of the searches for rentable ones, and back."""
        self._rows[offer] |= {"rented": rented, "rentable": not rented}

    def withdraw(self, offer: int) -> None:
        """Somebody else was faster: in no search any more."""
        self._gone.add(offer)

    def search(self, body: Any, now: float) -> list[Row]:
        """The rows that a search's JSON body asks for, priced for its disk, in its order. Raises BadQuery."""
        if not isinstance(body, dict):
            raise BadQuery("Input should be a valid dictionary")
        tests = [_test(name, condition) for name, condition in body.items() if name not in _NOT_FILTERS]
        kind = body.get("type") or "on-demand"
        if kind not in _TYPES:
            raise BadQuery(f"type: {kind!r} is not one of {sorted(_TYPES)}")
        storage = _number(body.get("allocated_storage", 5.0), "allocated_storage")
        rows = [
            priced(row, storage, now, bid=_TYPES[kind]) for offer, row in self._rows.items() if offer not in self._gone
        ]
        rows = [row for row in rows if all(test(row) for test in tests)]
        limit = MAX_ROWS if body.get("limit") is None else int(_number(body["limit"], "limit"))
        return _ordered(rows, body.get("order"))[: max(0, min(limit, MAX_ROWS))]


def matcher(filters: Mapping[str, Any]) -> Callable[[Row], bool]:
    """Does a row pass all of `{column: {operator: value}}`? Unlike in a search, `id` is just an id. Raises BadQuery."""
    checked = {name: _condition(name, condition) for name, condition in filters.items()}

    def matches(row: Row) -> bool:
        return all(
            _holds((row[name],), operator, wanted)
            for name, condition in checked.items()
            for operator, wanted in condition.items()
        )

    return matches


def priced(row: Mapping[str, Any], storage_gb: float, now: float, *, bid: bool = False) -> Row:
    """A copy of an offer with the prices for that much disk."""
    priced_row = copy.deepcopy(dict(row))
    gpu = row["min_bid"] if bid else row["dph_base"]
    disk = disk_hour(row["storage_cost"], storage_gb)
    total = gpu + disk
    priced_row |= {
        "is_bid": bid,
        "dph_base": gpu,
        "dph_total": total,
        "dph_total_adj": total,
        "discounted_dph_total": total,
        "storage_total_cost": disk,
        "duration": row["end_date"] - now,
        "dlperf_per_dphtotal": row["dlperf"] / total,
        "flops_per_dphtotal": row["total_flops"] / total,
    }
    priced_row["search"] = {
        "gpuCostPerHour": gpu,
        "diskHour": disk,
        "totalHour": total,
        "discountTotalHour": 0,
        "discountedTotalPerHour": total,
    }
    return priced_row


def _row(blank: Row, machine: _Machine, size: int, now: float, chance: random.Random) -> Row:
    gpu = _GPUS[machine.gpu]
    share = size / max(machine.sizes)
    price = round(machine.price * size * chance.uniform(0.995, 1.005), 4)
    cores = chance.choice((16, 24, 32, 48, 64, 96, 128))
    return copy.deepcopy(blank) | {
        "bundle_id": chance.randrange(1_000_000_000, 2_000_000_000),
        "gpu_name": machine.gpu,
        "num_gpus": size,
        "gpu_frac": share,
        "gpu_ids": [chance.randrange(10_000, 99_999) for _ in range(size)],
        "gpu_ram": gpu.ram_mb,
        "gpu_total_ram": gpu.ram_mb * size,
        "gpu_mem_bw": gpu.bandwidth,
        "gpu_max_power": gpu.watts,
        "compute_cap": gpu.compute_cap,
        "total_flops": gpu.tflops * size,
        "dlperf": gpu.dlperf * size,
        "score": round(gpu.dlperf * size / price / 2 * machine.reliability, 4),
        "cpu_ram": machine.ram_gb * 1003,
        "cpu_cores": cores,
        "cpu_cores_effective": round(cores * share, 1),
        "disk_space": machine.disk_gb,
        "storage_cost": machine.disk,
        "dph_base": price,
        "min_bid": round(price * 0.6, 4),
        "inet_down": float(machine.down),
        "inet_up": float(machine.up),
        "internet_down_cost_per_tb": machine.down_tb,
        "internet_up_cost_per_tb": machine.up_tb,
        "inet_down_cost": machine.down_tb / 1024,
        "inet_up_cost": machine.up_tb / 1024,
        "reliability": machine.reliability,
        "reliability2": machine.reliability,
        "verification": machine.verified,
        "vericode": int(machine.verified == "verified"),
        "hosting_type": int(machine.datacenter),
        "cuda_max_good": machine.cuda,
        "direct_port_count": machine.ports,
        "static_ip": machine.ports > 0,
        "geolocation": machine.place,
        "geolocode": chance.randrange(500_000_000, 600_000_000),
        "start_date": now - 30 * _DAY,
        "end_date": now + machine.days * _DAY,
        "rentable": True,
        "rented": False,
    }


_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
}
_OPERATORS = {"eq", "neq", "in", "notin", *_COMPARE}


def _values(row: Row, name: str) -> tuple[Any, ...]:
    """What a filter of this name may mean of a row; more than one where the market accepts several spellings."""
    match name:
        case "id":
            return ()  # matches nothing on the real market: `ask_contract_id` does
        case "verified":
            return (row["verification"] == "verified",)
        case "datacenter":
            return (row["hosting_type"] == 1,)
        case "external":
            return (bool(row["external"]),)
        case "geolocation":
            return (row["geolocation"], row["geolocation"].rpartition(", ")[2])
        case "driver_version":
            return (row["driver_version"], row["driver_vers"])
        case _:
            return (row[name],)


def _condition(name: str, condition: Any) -> dict[str, Any]:
    if not isinstance(condition, dict):
        raise BadQuery(f"{name}: Input should be a valid dictionary")
    for operator, wanted in condition.items():
        if operator not in _OPERATORS:
            raise BadQuery(f"{name}: unknown operator {operator!r}")
        if operator in ("in", "notin") and not isinstance(wanted, list):
            raise BadQuery(f"{name}: {operator} takes a list")
    return condition


def _test(name: str, condition: Any) -> Callable[[Row], bool]:
    checked = _condition(name, condition)

    def test(row: Row) -> bool:
        if name not in row and name not in ("verified", "datacenter"):
            return True  # the market does not say that it knows no such field
        values = _values(row, name)
        return all(_holds(values, operator, wanted) for operator, wanted in checked.items())

    return test


def _holds(values: tuple[Any, ...], operator: str, wanted: Any) -> bool:
    match operator:
        case "eq":
            return any(_equal(value, wanted) for value in values)
        case "neq":
            return not any(_equal(value, wanted) for value in values)
        case "in":
            return any(_equal(value, one) for value in values for one in wanted)
        case "notin":
            return not any(_equal(value, one) for value in values for one in wanted)
        case _:
            return any(_ordered_pair(value, wanted, _COMPARE[operator]) for value in values)


def _equal(value: Any, wanted: Any) -> bool:
    """A string query sends numbers and booleans as strings."""
    if isinstance(wanted, str) and not isinstance(value, str):
        if isinstance(value, bool):
            return wanted.lower() == str(value).lower()
        number = _float(wanted)
        return number is not None and value is not None and number == value
    return bool(value == wanted)


def _ordered_pair(value: Any, wanted: Any, compare: Callable[[Any, Any], bool]) -> bool:
    left, right = _float(value), _float(wanted)
    return left is not None and right is not None and compare(left, right)


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _number(value: Any, name: str) -> float:
    number = _float(value)
    if number is None:
        raise BadQuery(f"{name}: Input should be a valid number")
    return number


def _ordered(rows: Iterable[Row], order: Any) -> list[Row]:
    """By the columns of `[[name, "asc"|"desc"], …]`, the first one first; rows without a value come last."""
    result = list(rows)
    try:
        columns = [(str(name), str(direction) == "desc") for name, direction in order or [("score", "desc")]]
    except (TypeError, ValueError) as error:
        raise BadQuery("order: Input should be a list of pairs") from error
    for name, down in reversed(columns):
        known = [row for row in result if _float(row.get(name)) is not None]
        unknown = [row for row in result if _float(row.get(name)) is None]
        result = sorted(known, key=lambda row: float(row[name]), reverse=down) + unknown
    return result
