"""An example of each JSON answer, for the OpenAPI description."""

from __future__ import annotations

from typing import Any

from .answers import EXAMPLE, Change

CHANGE: Any = Change.model_config["json_schema_extra"]["examples"][0]  # type: ignore[index]
CALIBRATION = {
    "generation": 4, "stale": False, "running": False, "false_alarms": 0.05, "images": 761, "image_threshold": 2.01,
    "pixel_threshold": 4.4,
}  # fmt: skip
GALLERY = {
    "name": "tiles", "loaded": True, "problem": None, "generation": 4, "images": 761, "extractor": "efficientnet_lite0",
    "recipe": "relative", "patches": "stored", "k": 50, "calibration": CALIBRATION, "calibrating": False, "notes": [],
    "scale": {"low": 0.9, "high": 8.8},
}  # fmt: skip
COUNTS = {"parts": 812, "normal": 790, "anomalous": 20, "errors": 2, "ms_min": 402.1, "ms_mean": 431.9, "ms_max": 911.0}
MODEL = {
    "name": "tiles", "versions": ["4"], "platform": "spade-faiss",
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
    "outputs": [
        {"name": "verdict", "datatype": "BYTES", "shape": [-1]},
        {"name": "image_score", "datatype": "FP32", "shape": [-1]},
    ],
}  # fmt: skip
READY = {"name": "tiles", "version": "4", "ready": True}
INFERRED = {
    "model_name": "tiles", "model_version": "4", "id": "7",
    "outputs": [
        {"name": "verdict", "datatype": "BYTES", "shape": [1], "data": ["anomalous"]},
        {"name": "image_score", "datatype": "FP32", "shape": [1], "data": [3.41]},
    ],
}  # fmt: skip
REJUDGED = {
    "false_alarms": 0.01, "in_force": 0.05, "thresholds": {"image": 2.4, "pixel": 5.1}, "least": 0.0013, "images": 761,
    "parts": [{"id": EXAMPLE["id"], "before": "anomalous", "after": "normal", "changes": True}],
    "anomalous_before": 1, "anomalous_after": 0, "changed": 1,
}  # fmt: skip
STATISTICS = {
    "counts": COUNTS,
    "histogram": {"edges": [0.5, 1.0, 2.0], "parts": [790, 22], "normal": [730, 31], "threshold": 2.01},
    "drift": {"parts": 200, "needed": 20, "p_value": 0.41, "statistic": 0.07, "alarm": False, "toward": "lower scores"},
    "trend": [{"id": EXAMPLE["id"], "at": EXAMPLE["at"], "score": 0.63, "verdict": "anomalous", "p_value": 0.0244}],
    "rates": [0.0013, 0.01, 0.05], "false_alarms": 0.05, "queue": 3,
}  # fmt: skip
MATCHES = {
    "keys": ["good/003.png", "good/017.png"], "grid": [1, 2], "tiles": [[0, 0, 320, 320]], "resized": [320, 320],
    "crop": [320, 320], "neighbour": [[0, 1]], "row": [[0, 0]], "column": [[1, 1]], "sq_distance": [[0.8, 4.2]],
}  # fmt: skip
SUSPECT = {"key": "good/118.png", "image_score": 2.6, "map_max": 6.1, "outlier_score": 5.2, "copies": 0}

PREDICTION = {
    "model_version": "spade-faiss 0.1.0, generation 4", "score": 0.63,
    "result": [
        {
            "id": "region-1", "from_name": "label", "to_name": "image", "type": "polygonlabels", "original_width": 320,
            "original_height": 320, "image_rotation": 0, "score": 0.64,
            "meta": {"text": ["peak 7.9, threshold 4.4"]},
            "value": {
                "points": [[36.2, 31.1], [38.4, 31.1], [38.4, 34.0]], "closed": True, "polygonlabels": ["anomaly"],
            },
        }
    ],
}  # fmt: skip

EXAMPLES: dict[str, Any] = {  # by path; an answer whose model has an example needs none
    "/v1/galleries/{name}/inspect": EXAMPLE,
    "/v1/inspections": {"inspections": [EXAMPLE]},
    "/v1/inspections/{uid}/neighbours": {"generation": 4, "neighbours": EXAMPLE["neighbours"]},
    "/v1/inspections/{uid}/matches": MATCHES,
    "/v1/inspections/{uid}/score-at": {"x": 120, "y": 104, "score": 7.9},
    "/v1/galleries": {"galleries": [GALLERY]},
    "/v1/galleries/{name}": GALLERY,
    "/v1/galleries/{name}/calibrate": GALLERY | {"calibrating": True},
    "/v1/galleries/{name}/audit": {"generation": 4, "suspects": [SUSPECT]},
    "/v1/galleries/{name}/rejudge": REJUDGED,
    "/v1/galleries/{name}/statistics": STATISTICS,
    "/v1/galleries/{name}/statistics/reset": {"counts": dict.fromkeys(COUNTS, 0)},
    "/v1/changes": {"changes": [CHANGE]},
    "/v2": {"name": "spade-faiss", "version": "0.1.0", "extensions": ["binary_tensor_data"]},
    "/v2/models/{name}": MODEL,
    "/v2/models/{name}/ready": READY,
    "/v2/models/{name}/infer": INFERRED,
    "/label-studio/{name}/health": {"status": "UP", "model_class": "spade-faiss 0.1.0", "v2": True},
    "/label-studio/{name}/setup": {"model_version": "spade-faiss 0.1.0, generation 4"},
    "/label-studio/{name}/predict": {"results": [PREDICTION]},
    "/health/live": {"live": True},
    "/health/ready": {"ready": True},
}
NORMAL = {"total": 761, "found": 1, "images": [{"key": "added/9f86d081884c7d65.png", "added": True}]}


def add_examples(schema: dict[str, Any]) -> dict[str, Any]:
    """Put the examples into an OpenAPI description; returns it."""
    for path, operations in schema["paths"].items():
        like = path.removeprefix("/v2") if path.startswith("/v2/health") else path.replace("/versions/{version}", "")
        for method, operation in operations.items():
            content = operation["responses"].get("200", {}).get("content", {}).get("application/json")
            example = NORMAL if (method, like) == ("get", "/v1/galleries/{name}/normal") else EXAMPLES.get(like)
            if content is not None and example is not None:
                content["example"] = example
    return schema
