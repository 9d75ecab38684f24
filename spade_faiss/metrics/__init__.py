"""How well scores tell anomalous from normal: image and pixel metrics, ROC and PRO curves.

`pixel` defines the metrics; `ranking` computes them from counts, for `image` too; `curves` writes and draws curves.
"""

from .curves import Curve
from .image import image_metrics
from .pixel import PixelMetrics
from .ranking import Metrics

__all__ = ["Curve", "Metrics", "PixelMetrics", "image_metrics"]
