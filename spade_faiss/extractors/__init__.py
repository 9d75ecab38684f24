"""Pixels to features: image features and pyramid levels.

`features` is what an extractor gives, `spec` describes it, `registry` loads extractors by name: `toy`, in NumPy, and
`networks`. `torch_networks` makes those, from `weights`, a file of the caller's or the one that is `embedded`; vision
transformers have `tokens`. `runtimes` chooses what runs a network: torch, or `openvino_network`, whose conversions
`converted` keeps. Where one is kept, `kept_networks` spares torch the making. `export` writes a network for
other programs. `pooling` is shared by both.
"""

from .features import Features
from .registry import Extractor, load_extractor
from .spec import ExtractorSpec

__all__ = ["Extractor", "ExtractorSpec", "Features", "load_extractor"]
