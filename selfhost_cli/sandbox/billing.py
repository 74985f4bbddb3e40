"""The clock that counts money: GPU while running, disk from creation, bytes. No I/O; the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

GB = 1_000_000_000
HOURS_PER_MONTH = 720


def disk_hour(storage_cost: float, disk_gb: float) -> float:
    """$/h of a disk, from the market's $/GB/month."""
    return storage_cost * disk_gb / HOURS_PER_MONTH


@dataclass(frozen=True)
class Bill:
    """Dollars so far, by kind."""

    gpu: float
    disk: float
    down: float
    up: float

    @property
    def total(self) -> float:
        return self.gpu + self.disk + self.down + self.up


@dataclass
class Meter:
    """Counts for one instance. `gpu_on` and `disk_on` are what is billed from the last `switch` on."""

    gpu_hour: float
    disk_hour: float
    down_per_gb: float
    up_per_gb: float
    since: float
    gpu_on: bool = False
    disk_on: bool = True
    down_bytes: int = 0
    up_bytes: int = 0
    _gpu: float = field(default=0.0, repr=False)
    _disk_s: float = field(default=0.0, repr=False)

    def switch(self, now: float, *, gpu: bool, disk: bool) -> None:
        """From `now` on bill these; what ran until now is counted at the old setting."""
        passed = max(0.0, now - self.since)
        self._gpu += passed * self.gpu_on / 3600 * self.gpu_hour
        self._disk_s += passed * self.disk_on
        self.since, self.gpu_on, self.disk_on = now, gpu, disk

    def reprice(self, now: float, gpu_hour: float) -> None:
        """From `now` on the GPU costs that much."""
        self.switch(now, gpu=self.gpu_on, disk=self.disk_on)
        self.gpu_hour = gpu_hour

    @property
    def rates(self) -> tuple[float, float]:
        """$/h being billed now: GPU, disk."""
        return self.gpu_hour * self.gpu_on, self.disk_hour * self.disk_on

    def bill(self, now: float) -> Bill:
        passed = max(0.0, now - self.since)
        return Bill(
            gpu=self._gpu + passed * self.gpu_on / 3600 * self.gpu_hour,
            disk=(self._disk_s + passed * self.disk_on) / 3600 * self.disk_hour,
            down=self.down_bytes / GB * self.down_per_gb,
            up=self.up_bytes / GB * self.up_per_gb,
        )
