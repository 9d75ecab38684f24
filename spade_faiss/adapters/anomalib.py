"""SpadeFaiss: a model for anomalib's Engine, whose memory bank is a gallery on disk.

    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from spade_faiss.adapters.anomalib import SpadeFaiss

    Engine().fit(model=SpadeFaiss(gallery="bottle.gallery"), datamodule=MVTecAD(category="bottle"))

Needs the extra `anomalib`. docs/anomalib.md says which numbers equal which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from lightning.pytorch import Callback
from torch import nn

from ..detect.detector import Detector
from ..errors import GalleryNotFoundError, ImageError, NotEnoughImagesError, OptionError, SpadeError
from ..extractors.registry import Extractor
from ..gallery.gallery import Gallery
from ..object_store.address import refuse_address
from .anomalib_gallery import Filling, Options, extractor_of, record_of, recorded_gallery
from .anomalib_pixels import pixels_of
from .anomalib_processing import RankingPostProcessor, ViewPreProcessor

RECORD = "spade_faiss_gallery"  # of a checkpoint
FIT_FIRST = "fit first, or give gallery=PATH"
COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")  # of every model
FOLDER = "spade.gallery"  # in the engine's folder, where no other is given


class SpadeFaissModel(nn.Module):
    """Images to raw scores and maps, by a detector over the gallery."""

    def __init__(self, extractor: Extractor, options: Options) -> None:
        super().__init__()
        self.extractor, self.options = extractor, options
        self.detector: Detector | None = None

    def look_at(self, gallery: Gallery) -> None:
        """Compare with a gallery from now on.

        Raises:
            SpecMismatchError: it is one of another extractor, or of other settings.
            NotEnoughImagesError: it is empty, or has fewer images than the k that was given.
        """
        detector = Detector(gallery, self.extractor, self.options.search, self.options.score, calibrated=False)
        detector.baseline()  # measured now, where the scores need one, and not in the first query
        self.detector = detector

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Look for anomalies in images.

        Args:
            images: (n, 3, H, W) floating point in [0, 1], RGB.

        Returns:
            raw scores, (n,) float32, and raw maps, (n, 1, H, W) float32, neither normalised nor clamped: higher is more
            anomalous.

        Raises:
            ImageError: tensors of another kind.
        """
        if self.detector is None:
            raise GalleryNotFoundError(f"gallery: expected one that was fitted, found none; {FIT_FIRST}")
        found = self.detector.query_batch(pixels_of(images))
        scores = torch.tensor([one.image_score for one in found], dtype=torch.float32)
        maps = torch.from_numpy(np.stack([one.anomaly_map for one in found]))[:, None]
        return InferenceBatch(pred_score=scores.to(images.device), anomaly_map=maps.to(images.device))


class SpadeFaiss(MemoryBankMixin, AnomalibModule):
    """SPADE for anomalib's Engine: features of normal images go to a gallery on disk, in bounded memory.

    A fit that was cut off goes on where it was when it is run again with the same gallery. The checkpoint holds the
    gallery's path, generation and checksum, not its features.
    """

    def __init__(
        self,
        gallery: str | Path | None = None,
        backbone: str | None = None,
        recipe: str | None = None,
        weights: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        **components: Any,
    ) -> None:
        """Load the extractor; the gallery is opened when it is needed.

        Args:
            gallery: its folder, which a fit creates or goes on with. None: in the engine's folder of this run.
            backbone: see load_extractor. None: that of the gallery, if there is one, else the default.
            recipe: see RECIPES. None: that of the gallery, if there is one, else "wary".
            weights: file of the backbone's weights; see load_extractor.
            options: by their names, those of FeatureOptions, SearchOptions and ScoreOptions, as {"k": 20}; `device` is
                the network's. The others are the recipe's.
            components: pre_processor, post_processor, evaluator, visualizer; see AnomalibModule. pre_processor=False
                keeps images at the size that the datamodule gives them.

        Raises:
            OptionError: an unknown name or a value out of its range.
            WeightsError: weights that are missing or do not fit.
            GalleryError: the gallery there is damaged, or it is the address of an object store.

        >>> from spade_faiss.adapters.anomalib import SpadeFaiss
        >>> SpadeFaiss("bottle.gallery", recipe="wary", options={"k": 20}).gallery  # doctest: +SKIP
        PosixPath('bottle.gallery')
        """
        if unknown := components.keys() - set(COMPONENTS):
            raise OptionError(
                f"{min(unknown)}: expected gallery, backbone, recipe, weights, options, {', '.join(COMPONENTS)}, found "
                'another name; settings go into options, as options={"k": 20, "levels": ("layer2", "layer3")}'
            )
        refuse_address(gallery)
        own = Options.of(options or {})
        folder = None if gallery is None else Path(gallery)
        extractor = extractor_of(folder, backbone, recipe, weights, own)
        if components.get("pre_processor", True) is True:
            # An image in tiles is seen at its own size.
            resized = extractor.spec.tile is None and extractor.spec.view.resized
            components["pre_processor"] = ViewPreProcessor(resized) if resized else False
        super().__init__(**components)
        self.model = SpadeFaissModel(extractor, own)
        self._gallery, self._recipe = folder, recipe
        self._filling: Filling | None = None

    @property
    def gallery(self) -> Path:
        """The folder of the gallery."""
        if self.model.detector is not None:
            return self.model.detector.gallery.path
        return self._gallery or Path(self.trainer.default_root_dir) / FOLDER

    # Fitting.

    def on_fit_start(self) -> None:
        """Open the gallery, and take the writer's lock."""
        self._is_fitted = torch.tensor([False], device=self.device)
        if self.model.detector is not None:
            self.model.detector.gallery.close()
            self.model.detector = None
        self._filling = Filling(self.gallery, self.model.extractor, self._recipe)
        samples = getattr(getattr(getattr(self.trainer, "datamodule", None), "train_data", None), "samples", None)
        if samples is not None:
            self._filling.require_own(samples["image_path"].tolist())

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add the images of a batch to the gallery.

        Raises:
            ImageError: tensors of another kind, images without a path, or one that is labelled as anomalous.
        """
        assert self._filling is not None
        paths = batch.image_path
        if paths is None:
            raise ImageError("image_path: expected the path of each image, which is its key in the gallery, found none")
        if batch.gt_label is not None and bool(torch.any(batch.gt_label)):
            bad = paths[int(torch.argmax(batch.gt_label.int()))]
            raise ImageError(f"{bad}: expected normal images to train with, found one that is labelled as anomalous")
        self._filling.take(paths, pixels_of(batch.image))
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Commit what was added, and look for anomalies with it; without a fit, with what the gallery holds.

        Raises:
            NotEnoughImagesError: there are no normal images.
            GalleryNotFoundError: there was no fit, and there is no gallery.
        """
        filling, self._filling = self._filling, None
        try:
            gallery = filling.finish() if filling is not None else Gallery.open(self.gallery)
        except GalleryNotFoundError as error:
            raise GalleryNotFoundError(
                f"gallery: expected one that was fitted in {self.gallery}, found none; {FIT_FIRST}"
            ) from error
        if not len(gallery):
            raise NotEnoughImagesError(
                "datamodule: expected normal images to train with, found none; check its root and normal_dir"
            )
        self.model.look_at(gallery)

    def on_fit_end(self) -> None:
        """Refuse a fit without images, of which the trainer has passed over the epoch."""
        if not self._is_fitted:
            self.fit()

    def stop(self) -> None:
        """Commit the batches that are complete, and give the gallery's lock back; an error has ended the fit."""
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.stop()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Return anomalib's own, and what is done after an error."""
        return [*super().configure_callbacks(), _AfterErrors()]

    # Validation, test and predict.

    def on_test_start(self) -> None:
        """Open the gallery, if neither a fit nor a checkpoint has."""
        if self.model.detector is None:
            self.fit()

    on_predict_start = on_test_start

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """Return the batch with raw scores and maps."""
        return batch.update(**self.model(batch.image)._asdict())

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the gallery's path, generation and checksum."""
        super().on_save_checkpoint(checkpoint)
        if self.model.detector is not None:
            checkpoint[RECORD] = record_of(self.model.detector.gallery)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Open the gallery of the checkpoint.

        Raises:
            GalleryNotFoundError: it is not there.
            GalleryError: it has changed since, or the checkpoint is none of a fit.
            SpecMismatchError: it is one of another backbone.
        """
        super().on_load_checkpoint(checkpoint)
        self.model.look_at(recorded_gallery(checkpoint.get(RECORD), self._gallery, self.model.extractor))

    # What anomalib asks of a model.

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the images, on one device."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """Normal images only."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised."""

    @staticmethod
    def configure_post_processor() -> RankingPostProcessor:
        """Return anomalib's normalisation, without its clamp."""
        return RankingPostProcessor()

    def to_torch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the features are in a gallery on disk.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            "export: expected a model that is all network, found one with a gallery on disk; copy the gallery's folder "
            "and query it with spade_faiss.Detector or `spade-faiss serve`"
        )

    to_onnx = to_torch
    to_openvino = to_torch


class _AfterErrors(Callback):
    """Keeps what a fit has done when an error, or Ctrl-C, ends it, and has errors of loading workers in one line."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Commit the complete batches; torch raises a worker's error with its traceback as the message."""
        pl_module.stop()
        text = str(exception).rstrip()
        if isinstance(exception, SpadeError) and text.startswith("Caught ") and "\n" in text:
            _, _, message = text.splitlines()[-1].partition(": ")  # after the class
            exception.args = (message,)
