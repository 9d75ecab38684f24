"""Result folders without a query: maps with regions of every shape, as `query --output` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from spade_faiss.detect.regions import find_regions
from spade_faiss.report.colour_scale import Scale
from spade_faiss.report.run_record import RunRecord

THRESHOLD = 1.0
RUN = RunRecord("tiles.gallery", 4, {"image": 2.0, "pixel": THRESHOLD, "false_alarms": 0.05})


def masks() -> dict[str, NDArray[np.bool_]]:
    """Regions as they come, and as they are hard to write: by key."""
    found = {name: np.zeros((23, 31), np.bool_) for name in ("none", "pixel", "corner", "ring", "touching", "islands")}
    found["pixel"][7, 9] = found["corner"][-1, -1] = True
    found["ring"][4:19, 5:27] = True
    found["ring"][7:9, 8:20] = found["ring"][12, 12] = found["ring"][15:17, 20:26] = False
    found["touching"][[3, 4, 5, 6], [3, 4, 5, 4]] = True  # at corners only, around a hole
    found["islands"][2:20, 2:20] = True
    found["islands"][4:18, 4:18] = False
    found["islands"][8:14, 8:14] = True  # a region inside another's hole
    found["whole"] = np.ones((5, 8), np.bool_)
    noise = np.random.default_rng(3).normal(size=(40, 56))
    found["blobs"] = ndimage.gaussian_filter(noise, 2) > 0.05
    found["noise"] = noise[:20, :30] > 0.6
    return {f"a/{name}.png": mask for name, mask in found.items()}


def write_results(folder: Path, found: Mapping[str, NDArray[np.bool_]], run: RunRecord = RUN) -> Path:
    """Write a result folder whose regions are those of masks."""
    lines, rng = [], np.random.default_rng(0)
    for key, mask in found.items():
        scores = np.where(mask, 2, 0.5).astype(np.float32) + rng.random(mask.shape, np.float32) / 4
        regions, _ = find_regions(scores, THRESHOLD)
        name = f"maps/{key}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, scores)
        judged = {
            "verdict": "anomalous" if regions else "normal",
            "p_value": 0.125,
            "score": 0.75 if regions else 0.25,
            "regions": [asdict(region) for region in regions],
        }
        near = [{"key": "000.png", "sq_distance": 0.5}]
        line = {"path": f"/images/{key}", "key": key, "image_score": 6.0, "neighbours": near, **judged, "map": name}
        lines.append(json.dumps(line) + "\n")
    (folder / "results.jsonl").write_text("".join(lines))
    (folder / "scale.json").write_text(json.dumps(asdict(Scale(0.5, 2.0, THRESHOLD))))
    run.finished(len(lines)).write(folder)
    return folder
