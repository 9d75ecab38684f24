"""What the service answers, as types that the OpenAPI description shows with examples."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EXAMPLE: Any = {
    "id": "5f1c0a9be2d74c11",
    "number": 812,
    "at": 1764144000.25,
    "gallery": "tiles",
    "name": "part-000812.png",
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "verdict": "anomalous",
    "image_score": 3.41,
    "score": 0.63,
    "p_value": 0.0244,
    "map_max": 7.9,
    "generation": 4,
    "stale": False,
    "label": None,
    "error": None,
    "ms": 431.2,
    "width": 320,
    "height": 320,
    "regions": [
        {
            "box": [100, 90, 140, 122],
            "area": 871,
            "peak": 7.9,
            "polygon": [[100.0, 91.5], [101.5, 90.0], [140.0, 122.0]],
        }
    ],
    "neighbours": [{"key": "good/003.png", "sq_distance": 0.81}],
    "thresholds": {"image": 2.01, "pixel": 4.4, "false_alarms": 0.05},
    "seconds": {"decode": 0.004, "extract": 0.09, "retrieve": 0.001, "read": 0.02, "match": 0.3, "score": 0.01},
    "searched": True,
}


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="forbid")


class ErrorFacts(Answer):
    """What went wrong."""

    code: str = Field(examples=["queue_full"])
    message: str = Field(examples=["32 of 32 images wait; try again in 13 s."])
    request_id: str | None = Field(None, examples=["6d1f2c3b4a596877"])


class ErrorAnswer(Answer):
    """Every answer that is not what was asked for."""

    error: ErrorFacts


class InferenceError(Answer):
    """The same under /v2, where the sentence alone is `error`, as the Open Inference Protocol has it."""

    error: str = Field(examples=["32 of 32 images wait; try again in 13 s."])
    code: str = Field(examples=["queue_full"])
    message: str = Field(examples=["32 of 32 images wait; try again in 13 s."])
    request_id: str | None = Field(None, examples=["6d1f2c3b4a596877"])


class RegionAnswer(Answer):
    """Connected pixels above the pixel threshold."""

    box: list[int] = Field(description="left, top, right, bottom; half-open; pixels of the image")
    area: int = Field(description="pixels")
    peak: float = Field(description="largest pixel score")
    polygon: list[list[float]] = Field(description="outline, [x, y] in pixels")


class NeighbourAnswer(Answer):
    """A normal image that was searched."""

    key: str
    sq_distance: float


class ThresholdsAnswer(Answer):
    """What the part was judged by."""

    image: float
    pixel: float | None
    false_alarms: float | None = Field(description="the promised rate; null where a threshold was given instead")


class MapAnswer(Answer):
    """The anomaly map as a file."""

    media_type: str
    base64: str


class Inspection(Answer):
    """What was found in one image."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    id: str
    number: int = Field(description="of the line in the log")
    at: float = Field(description="seconds since 1970")
    gallery: str
    name: str
    sha256: str
    verdict: Literal["normal", "anomalous"] | None = Field(description="null: not calibrated, or an error")
    image_score: float | None
    score: float | None = Field(description="the image score in [0, 1], the threshold at 0.5")
    p_value: float | None
    map_max: float | None
    generation: int | None = Field(description="of the gallery that it was compared with")
    label: str | None = Field(description="what a person said: false_alarm, defect, unsure")
    error: ErrorFacts | None
    ms: float | None = Field(description="from the request's arrival to the log")
    width: int | None
    height: int | None
    regions: list[RegionAnswer]
    neighbours: list[NeighbourAnswer]
    thresholds: ThresholdsAnswer | None
    seconds: dict[str, float] = Field(description="by stage; `wait` is the time in the queue")
    searched: bool | None
    stale: bool | None = Field(description="whether the gallery has changed since its calibration")
    notes: list[str] = []
    map: MapAnswer | None = None
    matches: dict[str, Any] | None = None


class Inspections(Answer):
    """Several inspections, newest first, or in the order of a batch."""

    inspections: list[Inspection]


class CalibrationAnswer(Answer):
    """The thresholds in force."""

    generation: int
    stale: bool
    running: bool
    false_alarms: float
    images: int
    image_threshold: float
    pixel_threshold: float


class GalleryAnswer(Answer):
    """The facts of a gallery."""

    name: str
    loaded: bool
    problem: str | None
    generation: int | None = None
    images: int | None = None
    extractor: str | None = None
    recipe: str | None = None
    patches: str | None = None
    k: int | None = None
    calibration: CalibrationAnswer | None = None
    calibrating: bool = False
    notes: list[str] = []
    scale: dict[str, float] | None = None


class Galleries(Answer):
    """All galleries that are served."""

    galleries: list[GalleryAnswer]


class Change(Answer):
    """A change of a gallery, as the audit log has it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "id": 17, "at": 1764144003.5, "request": "6d1f2c3b4a596877", "who": "line-3", "gallery": "tiles",
                    "what": "add", "key": "added/9f86d081884c7d65.png", "inspection": "5f1c0a9be2d74c11",
                    "generation_before": 4, "generation_after": 5, "state": "done", "message": None, "undoes": None,
                    "facts": {},
                }
            ]
        },
    )  # fmt: skip

    id: int
    at: float
    request: str
    who: str
    gallery: str
    what: str
    key: str | None
    inspection: str | None
    generation_before: int | None
    generation_after: int | None
    state: str
    message: str | None
    undoes: int | None
    facts: dict[str, Any]


class Changes(Answer):
    """The audit log, newest first."""

    changes: list[Change]


class NormalImage(Answer):
    """An image of the normal set."""

    key: str
    added: bool = Field(description="whether the service added it")


class NormalImages(Answer):
    """A page of the normal set."""

    total: int
    found: int
    images: list[NormalImage]


class SuspectAnswer(Answer):
    """A normal image, and how far it is from the others."""

    key: str
    image_score: float
    map_max: float
    outlier_score: float = Field(description="spreads of logarithms above the median")
    copies: int


class Audit(Answer):
    """The normal images that are least like the others."""

    generation: int
    suspects: list[SuspectAnswer]


class Label(BaseModel):
    """What a person says of a part."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"label": "defect"}]})
    label: Literal["defect", "unsure"] | None


class FalseAlarms(BaseModel):
    """A rate of false alarms."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"false_alarms": 0.01}]})
    false_alarms: float = Field(gt=0, lt=1, allow_inf_nan=False)


class InspectedImage(BaseModel):
    """An inspection whose picture becomes a normal image."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"inspection": "5f1c0a9be2d74c11"}]})
    inspection: str = Field(max_length=64)
