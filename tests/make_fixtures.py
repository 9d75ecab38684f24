"""Write tests/fixtures: small galleries of the toy extractor, of this version, and what they answer.

python tests/make_fixtures.py

They are kept as they are, so that a later release shows that it opens them with the same answers. Written anew only
when a format version changes, under a new name beside the old ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import spade_faiss as sf
from spade_faiss.options import Patches

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
NAMES: dict[str, Patches] = {"stored-1": "stored", "recompute-1": "recompute"}  # of format version 1
N = 6


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(N):
        flat = rng.integers(60, 190, (2, 2, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        Image.fromarray(flat).save(folder / f"{number}.png")


def query() -> np.ndarray:
    return np.random.default_rng(1).integers(60, 190, (8, 8, 3)).astype(np.uint8)


def toy() -> sf.Extractor:
    return sf.load_extractor("toy", options=sf.FeatureOptions(image_size=8, strides=(4, 8), batch_size=4))


def answers(path: Path) -> dict[str, Any]:
    """What a gallery answers, as JSON values; of where its image files are only the names."""
    extractor, normal = toy(), FIXTURES / "normal"
    with sf.Gallery.open(path, "cpu") as gallery:
        snapshot, ids = gallery.snapshot(), gallery.snapshot().ids()
        levels = gallery.read(ids, None if gallery.patches == "stored" else extractor, [normal])
        found, sq_distances = gallery.search(snapshot.rows.read(ids[:2]), 3)
        detection = sf.Detector(gallery, extractor, normal=[normal]).query(query())
        assert detection.judgement is not None
        sources = [snapshot.source(row_id) for row_id in ids.tolist()]
        return {
            "problems": [problem.message for problem in gallery.verify(normal=[normal])],
            "spec": json.loads(json.dumps(gallery.spec.to_json())),
            "keys": gallery.keys(),
            "removed": np.flatnonzero(snapshot.removed_mask).tolist(),
            "digests": snapshot.digests(ids),
            "sources": [source and Path(source).name for source in sources],
            "image": snapshot.rows.read(ids).tolist(),
            "levels": [level.tolist() for level in levels],
            "ids": found.tolist(),
            "sq_distances": sq_distances.tolist(),
            "image_score": detection.image_score,
            "map": detection.anomaly_map.tolist(),
            "verdict": detection.judgement.verdict,
            "p_value": detection.judgement.p_value,
        }


def main() -> None:
    shutil.rmtree(FIXTURES, ignore_errors=True)
    write_images(FIXTURES / "normal")
    extractor = toy()
    for name, patches in NAMES.items():
        path = FIXTURES / name
        gallery = sf.Gallery.create(path, extractor.spec, sf.IndexOptions(device="cpu"), patches=patches)
        # Where the files are is of this machine, and they are found by --normal: a place that is on no other.
        with gallery.writer() as writer:
            files = sorted((FIXTURES / "normal").iterdir())
            views = [extractor.spec.view.apply(sf.images.decode.decode(file)) for file in files]
            digests = [sf.store.source_images.content_digest(file.read_bytes()) for file in files]
            sources = [f"/normal/{file.name}" for file in files]
            writer.append([file.name for file in files], extractor.extract(views), digests, sources=sources)
        gallery.remove(["1.png"])
        detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=2), normal=[FIXTURES / "normal"])
        sf.calibrate(detector, 0.2).write(path)
        gallery.close()
        for left in ("readers.lock", "writer.lock", "writer.pid"):
            (path / left).unlink(missing_ok=True)
        (FIXTURES / f"{name}.json").write_text(json.dumps(answers(path), indent=None) + "\n")
        for left in ("readers.lock", "writer.lock", "writer.pid"):
            (path / left).unlink(missing_ok=True)
    print(sum(file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()), "bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
