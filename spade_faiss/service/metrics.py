"""What Prometheus reads: counts, seconds, scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
P_VALUES = tuple(step / 10 for step in range(1, 11))
SCORES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PREFIX = "spade_faiss"


class Metrics:
    """The metrics of one service; its own registry, so that two services in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry, "namespace": PREFIX}
        self.parts = Counter("parts", "Inspections by outcome.", ["gallery", "verdict"], **own)
        self.stages = Histogram("stage_seconds", "Seconds by stage.", ["gallery", "stage"], buckets=SECONDS, **own)
        self.seconds = Histogram(
            "inspection_seconds", "Seconds of a whole inspection.", ["gallery"], buckets=SECONDS, **own
        )
        self.scores = Histogram(
            "score", "Image scores in [0, 1], the threshold at 0.5.", ["gallery"], buckets=SCORES, **own
        )
        self.p_values = Histogram("p_value", "p-values of image scores.", ["gallery"], buckets=P_VALUES, **own)
        self.rejected = Counter("rejected", "Requests that were not answered, by code.", ["code"], **own)
        self.requests = Counter("requests", "Requests by status.", ["status"], **own)
        self.depth = Gauge("queue_depth", "Images that wait.", **own)
        self.generation = Gauge("generation", "Generation that is served.", ["gallery"], **own)
        self.images = Gauge("images", "Normal images.", ["gallery"], **own)
        self.stale = Gauge(
            "calibration_stale", "1 if the gallery has changed since its calibration.", ["gallery"], **own
        )
        self.changes = Counter("changes", "Changes of galleries by kind.", ["gallery", "what"], **own)
        self.hits = Gauge("cache_hits", "Levels of normal images that were in memory when needed.", ["gallery"], **own)
        self.misses = Gauge("cache_misses", "Levels of normal images that had to be read.", ["gallery"], **own)
        self.outbox = Gauge("outbox", "Results that wait to be sent.", **own)

    def inspected(self, gallery: str, values: Mapping[str, object], stages: Mapping[str, float]) -> None:
        """Count an inspection."""
        verdict = values.get("verdict") or ("error" if values.get("error") else "unjudged")
        self.parts.labels(gallery, str(verdict)).inc()
        for stage, seconds in stages.items():
            self.stages.labels(gallery, stage).observe(seconds)
        milliseconds, score, p_value = values.get("ms"), values.get("score"), values.get("p_value")
        if isinstance(milliseconds, float):
            self.seconds.labels(gallery).observe(milliseconds / 1000)
        if isinstance(score, float):
            self.scores.labels(gallery).observe(score)
        if isinstance(p_value, float):
            self.p_values.labels(gallery).observe(p_value)

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self.registry)
