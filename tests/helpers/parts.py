"""A folder of parts: normal and anomalous images, and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_parts(root: Path, size_of: Any) -> Path:
    rng = np.random.default_rng(0)
    for kind, n in (("good", 8), ("bad", 4), ("test_good", 4)):
        (root / kind).mkdir()
        for number in range(n):
            pixels = rng.integers(100, 160, (*size_of(number), 3)).astype(np.uint8)
            if kind == "bad":
                pixels[8:24, 12:30] = 200
                mask = np.zeros(size_of(number), np.uint8)
                mask[8:24, 12:30] = 255
                (root / "masks").mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / "masks" / f"{number}.png")
            Image.fromarray(pixels).save(root / kind / f"{number}.png")
    return root
