"""Pixels to features: image features and pyramid levels.

`features` is what an extractor gives, `spec` describes it, `registry` loads extractors by name: `toy`, in NumPy, and
`networks`, whose models come from `weights` and whose vision transformers' tokens are in `tokens`. `runtimes` chooses
what runs a network: torch, or `openvino_network`, whose conversions `converted` keeps. `export` writes a network for
other programs. `pooling` is shared by both.
"""

from .features import Features
from .registry import Extractor, load_extractor
from .spec import ExtractorSpec

__all__ = ["Extractor", "ExtractorSpec", "Features", "load_extractor"]
