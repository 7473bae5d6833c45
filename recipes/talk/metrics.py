"""Counts and durations as Prometheus reads them."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

COUNTERS = {
    "sessions": "conversations that began", "refused": "connections that were turned away",
    "complaints": "conversations that ended with an error of the client's",
    "frames": "frames of all conversations that were computed",
    "frames_dropped": "frames heard too late, and left out",
    "answers_dropped": "frames said to clients that did not take them, and left out",
    "steps_failed": "steps of the model that failed"}
DURATIONS = {
    "step_seconds": ("one step of all conversations", (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5)),
    "answer_seconds": ("from a frame heard to what was said on it, sent", (0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.5, 1))}
GAUGES = {"live": "conversations that go on", "waiting": "clients that wait for a place", "capacity": "places",
          "memory_bytes": "memory of the process"}


class Metrics:
    """Any thread may count."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.buckets = {name: [0] * (len(edges) + 1) for name, (_, edges) in DURATIONS.items()}
        self.sums = dict.fromkeys(DURATIONS, 0.0)

    def add(self, name: str, count: int = 1) -> None:
        with self.lock:
            self.counts[name] += count

    def observe(self, name: str, seconds: float) -> None:
        with self.lock:
            at = sum(seconds > edge for edge in DURATIONS[name][1])
            self.buckets[name][at] += 1
            self.sums[name] += seconds

    def text(self, gauges: dict[str, float]) -> str:
        """The exposition format 0.0.4; gauges by name."""
        with self.lock:
            lines = [line for name, about in COUNTERS.items()
                     for line in series(f"{name}_total", about, "counter", {"": self.counts[name]})]
            for name, (about, edges) in DURATIONS.items():
                lines += histogram(name, about, edges, self.buckets[name], self.sums[name])
        for name, value in gauges.items():
            lines += series(name, GAUGES[name], "gauge", {"": value})
        return "\n".join(lines) + "\n"


def series(name: str, about: str, kind: str, values: dict[str, float]) -> list[str]:
    full = f"mm_talk_{name}"
    return [f"# HELP {full} {about}", f"# TYPE {full} {kind}", *(f"{full}{end} {value}" for end, value in
                                                                values.items())]


def histogram(name: str, about: str, edges: tuple[float, ...], buckets: list[int], total: float) -> list[str]:
    values, below = {}, 0
    for edge, count in zip((*edges, "+Inf"), buckets, strict=True):
        below += count
        values[f'_bucket{{le="{edge}"}}'] = below
    return series(name, about, "histogram", values | {"_sum": total, "_count": below})


def memory() -> int:
    """Bytes of this process that lie in memory; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else 0
