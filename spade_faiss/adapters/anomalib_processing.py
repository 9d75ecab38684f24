"""What anomalib does before and after the model: the view of an image, and scores that people read."""

from __future__ import annotations

from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor

from .anomalib_pixels import ViewResize


class ViewPreProcessor(PreProcessor):
    """Resizes images as the gallery's extractor sees them; normalisation and crop are the extractor's own."""

    def __init__(self, size: tuple[int, int]) -> None:
        """Take the (height, width) in pixels that images are resized to, whatever their proportions."""
        super().__init__(transform=ViewResize(size))

    def checkpoint_config(self) -> dict[str, Any]:
        """Return nothing: the size is that of the extractor, which the model's own parameters choose."""
        return {}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Keep the size of the extractor."""


class RankingPostProcessor(PostProcessor):
    """anomalib's normalisation of scores, without its clamp to [0, 1].

    The clamp gives all scores beyond those of the validation set one value, and with it one rank, which moves AUROC.
    Here thresholds lie at 0.5 too, and no larger score becomes a smaller one: y = 1/2 + z / (1 + 2 |z|), where z is the
    score minus the threshold, divided by the range of the validation set's scores. Without a validation set z is the
    score: scores are never left as they are, because torchmetrics takes a batch with values beyond [0, 1] for logits,
    and one without for probabilities, so that scores of two batches would not be in their order.

    Near 1 float32 has steps of 6e-8. Scores that differ by less than about z^2 / 4 000 000, which is 0.25 at z = 1000,
    may become equal. Without a validation set, metrics of scores in the thousands are therefore approximate.
    """

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None, norm_min: torch.Tensor, norm_max: torch.Tensor, threshold: torch.Tensor
    ) -> torch.Tensor | None:
        """Return scores in (0, 1) in the order of `preds`."""
        if preds is None:
            return None
        spread = norm_max - norm_min
        if bool(torch.isnan(spread)):
            middle, spread = torch.zeros_like(spread), torch.ones_like(spread)
        else:
            middle = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        z = (preds - middle) / torch.where(spread == 0, torch.ones_like(spread), spread)
        tail = 0.5 / (1 + 2 * z.abs())  # y below the threshold, 1 - y above; no step of it rounds scores out of order
        return torch.where(z > 0, 1 - tail, tail)
