"""A gallery as a similarity index of FiftyOne: `compute_similarity(backend="spade-faiss")`, `sort_by_similarity`.

FiftyOne builds these classes by their names. It opens them again in other sessions, by the configuration that it keeps.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fiftyone.brain.similarity import Similarity, SimilarityConfig, SimilarityIndex
from numpy.typing import NDArray

from ..errors import GalleryNotFoundError, OptionError
from ..extractors.registry import Extractor
from ..gallery.gallery import Gallery
from ..images.reading import decoding_gate, view_of
from ..system.prefetch import batched
from .fiftyone import BACKEND, files_of, images_of
from .sample_files import by_content, by_place, content_of

Vectors = NDArray[np.float32]  # (m, d) image features


class SpadeSimilarityConfig(SimilarityConfig):  # type: ignore[misc]
    """What the index is of.

    Args:
        gallery: path of the gallery. It is the user's: removing the run leaves it alone.
        root: the folder that it was built from; None: its images are found by their names and contents.
        weights: weights file of the gallery's network, where they are not found by themselves.
        kwargs: of SimilarityConfig. `embeddings=False` goes with it, as the gallery has the image features.

    Raises:
        OptionError: no gallery, an unknown name, or what an index of whole images does not have.
    """

    def __init__(
        self,
        gallery: str | os.PathLike[str] = "",
        root: str | os.PathLike[str] | None = None,
        weights: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = set(kwargs) - set(inspect.signature(SimilarityConfig).parameters)
        if unknown:  # which it would keep, and do nothing with
            raise OptionError(
                f"{min(unknown)}: expected gallery, root or weights with backend {BACKEND!r}, found an unknown name"
            )
        super().__init__(**kwargs)
        if not gallery or not isinstance(gallery, (str, os.PathLike)):
            raise OptionError(
                f"gallery: expected the path of a gallery with backend {BACKEND!r}, found {gallery or 'none'}"
            )
        for name in ("patches_field", "roi_field", "embeddings_field", "model"):
            if getattr(self, name) is not None:
                raise OptionError(
                    f"{name}: expected none with backend {BACKEND!r}, found {getattr(self, name)!r}: the gallery has "
                    "features of whole images; give embeddings=False"
                )
        self.gallery = str(Path(gallery).resolve())
        self.root = None if root is None else str(Path(root).resolve())
        self.weights = None if weights is None else str(Path(weights).resolve())

    @property
    def method(self) -> str:
        """The backend's name."""
        return BACKEND

    @property
    def max_k(self) -> None:
        """No limit."""
        return None

    @property
    def supports_least_similarity(self) -> bool:
        """FAISS finds the nearest only."""
        return False

    @property
    def supported_aggregations(self) -> tuple[str, ...]:
        """How several queries become one."""
        return ("mean",)


class SpadeSimilarity(Similarity):  # type: ignore[misc]
    """Opens the index."""

    def initialize(self, samples: Any, brain_key: str | None) -> SpadeSimilarityIndex:
        """Return the index of a gallery over the samples that are its images; after an error, the key is free again.

        Raises:
            GalleryError: it cannot be opened.
            OptionError: no data set of images, or none of the gallery's.
            ImageError: a sample that may be one has a file that cannot be read.
        """
        try:
            return SpadeSimilarityIndex(samples, self.config, brain_key, backend=self)
        except Exception:
            _withdraw(samples, brain_key)
            raise


def _withdraw(samples: Any, brain_key: str | None) -> None:
    """Delete a run without results, which FiftyOne registers before it has any: the key would stay taken."""
    if brain_key is not None and samples.load_brain_results(brain_key) is None:
        samples.delete_brain_run(brain_key)


def _opened(samples: Any, config: SpadeSimilarityConfig) -> tuple[Gallery, dict[str, int]]:
    """Open a gallery; returns the row of each sample that is one of its images as well."""
    try:
        gallery = Gallery.open(config.gallery)
    except GalleryNotFoundError as error:
        raise GalleryNotFoundError(
            f"gallery: expected one in {config.gallery}, found none; put it back, or delete the brain run and "
            "compute another one"
        ) from error
    try:
        return gallery, _rows(samples, config, gallery)
    except BaseException:
        gallery.close()
        raise


def _rows(samples: Any, config: SpadeSimilarityConfig, gallery: Gallery) -> dict[str, int]:
    if gallery.spec.tile is not None:
        raise OptionError(f"gallery: expected one of whole images, found {config.gallery}, whose images are tiles")
    if samples.media_type == "group":  # views of groups are of one slice
        raise OptionError(
            f"dataset: expected images, found groups in {samples.name}; compute the similarity of "
            "dataset.select_group_slices(media_type='image').clone()"
        )
    files, snapshot = files_of(images_of(samples)), gallery.snapshot()
    if config.root is None:
        found = by_content(files, snapshot, "root")
    else:
        keys = by_place(files, config.root)
        rows = zip(keys, snapshot.find_all(list(keys.values())), strict=True)
        found = {sample: row for sample, row in rows if row is not None}
    if not found:
        raise OptionError(
            f"gallery: expected samples that are images of {config.gallery}, found none among {len(files)}; add "
            "its images, or give root, the folder that it was built from"
        )
    return found


class SpadeSimilarityIndex(SimilarityIndex):  # type: ignore[misc]
    """The normal images of a gallery that are samples of a data set, and the nearest of them to any sample.

    A query is a sample of the data set, in the gallery or not, or a vector of the gallery's image features. Distances
    are squared L2, as Gallery.search gives them.
    """

    def __init__(self, samples: Any, config: SpadeSimilarityConfig, brain_key: str | None, backend: Any = None) -> None:
        self._extractor: Extractor | None = None
        self._gallery, self._row_of = _opened(samples, config)
        self._sample_ids = np.array(list(self._row_of))
        super().__init__(samples, config, brain_key, backend=backend)

    @property
    def sample_ids(self) -> NDArray[Any]:
        """The samples that are in the gallery."""
        return self._sample_ids

    @property
    def total_index_size(self) -> int:
        """How many these are."""
        return len(self._sample_ids)

    def add_to_index(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a gallery is filled by `add`.

        Raises:
            OptionError: always.
        """
        _withdraw(self._samples, self.key)
        raise OptionError(
            f"embeddings: expected False with backend {BACKEND!r}, found others: the gallery has its own; give "
            "embeddings=False, and add images by Gallery.add_images"
        )

    def remove_from_index(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a gallery loses images by `remove`.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"remove_from_index: expected another backend than {BACKEND!r}; use Gallery.remove")

    def get_embeddings(
        self,
        sample_ids: Sequence[str] | str | None = None,
        label_ids: object = None,
        allow_missing: bool = True,
        warn_missing: bool = False,
    ) -> tuple[Vectors, NDArray[Any], None]:
        """Return (n, d) image features of samples in the gallery, and the samples."""
        wanted = [sample_ids] if isinstance(sample_ids, str) else self._sample_ids if sample_ids is None else sample_ids
        found = [one for one in wanted if one in self._row_of]
        if len(found) < len(wanted) and not allow_missing:
            raise OptionError(f"sample_ids: expected images of the gallery, found {len(wanted) - len(found)} others")
        return self._features(found), np.array(found), None

    def reload(self) -> None:
        """Take up the gallery's last commit; an error leaves the index as it was."""
        gallery, rows = _opened(self._samples, self.config)
        if gallery.spec != self._gallery.spec:  # another gallery in its place
            self._extractor = None
        self._gallery, self._row_of, self._sample_ids = gallery, rows, np.array(list(rows))
        super().reload()

    @classmethod
    def _from_dict(
        cls, d: dict[str, Any], samples: Any, config: SpadeSimilarityConfig, brain_key: str
    ) -> SpadeSimilarityIndex:
        return cls(samples, config, brain_key)

    def cleanup(self) -> None:
        """Leave the gallery alone: it is the user's."""

    def _kneighbors(
        self,
        query: Any = None,
        k: int | None = None,
        reverse: bool = False,
        aggregation: str | None = None,
        return_dists: bool = False,
    ) -> tuple[Any, ...]:
        if reverse:
            raise OptionError(f"reverse: expected False with backend {BACKEND!r}, found True")
        if query is None:
            raise OptionError(f"query: expected samples or vectors with backend {BACKEND!r}, found none")
        if k is not None and (not isinstance(k, (int, np.integer)) or k < 1):
            raise OptionError(f"k: expected a number >= 1, or None for all samples, found {k!r}")
        if aggregation not in (None, "mean"):
            raise OptionError(f"aggregation: expected 'mean' with backend {BACKEND!r}, found {aggregation!r}")
        vectors, is_one = self._vectors(query)
        if aggregation == "mean" and len(vectors) > 1:
            vectors, is_one = vectors.mean(axis=0, keepdims=True), True
        samples, sq_distances = self._search(vectors, k)
        answer: tuple[Any, ...] = samples, None, sq_distances
        if is_one or aggregation is not None:
            answer = samples[0], None, sq_distances[0]
        return answer if return_dists else answer[:2]

    def _search(self, vectors: Vectors, k: int | None) -> tuple[list[list[str]], list[Vectors]]:
        """Return, for each query, the k nearest samples of the current view, and their squared distances."""
        shown = dict[int, list[str]]()  # several samples may be one image
        for one in self.current_sample_ids:
            if one in self._row_of:
                shown.setdefault(self._row_of[one], []).append(str(one))
        count = len(shown) if k is None else min(k, len(shown))
        if count == 0:
            return [[] for _ in vectors], [np.empty(0, np.float32) for _ in vectors]
        hidden = np.array([row for row in self._gallery.snapshot().ids().tolist() if row not in shown], np.int64)
        rows, sq_distances = self._gallery.search(vectors, count, without=hidden if len(hidden) else None)
        samples = [[one for row in found for one in shown[row]][:k] for found in rows.tolist()]
        far = [
            np.repeat(each, [len(shown[row]) for row in found])[:k]
            for found, each in zip(rows.tolist(), sq_distances, strict=True)
        ]
        return samples, far

    def _vectors(self, query: Any) -> tuple[Vectors, bool]:
        """Return a query's image features, and whether it is one."""
        if isinstance(query, np.ndarray) and query.dtype.kind in "fiu":
            return np.atleast_2d(np.asarray(query, np.float32)), query.ndim == 1
        ids = [query] if isinstance(query, str) else list(query)
        return self._features(ids), len(ids) == 1

    def _features(self, samples: Sequence[str]) -> Vectors:
        """Return (n, d) image features of samples: the gallery's, or those of their files."""
        snapshot = self._gallery.snapshot()
        others = [one for one in samples if one not in self._row_of]
        extracted = dict(zip(others, self._extracted(others), strict=True)) if others else {}
        found = [extracted[one] if one in extracted else snapshot.image_feature(self._row_of[one]) for one in samples]
        return np.array(found, np.float32).reshape(len(samples), self._gallery.spec.image_dim)

    def _extracted(self, samples: Sequence[str]) -> Vectors:
        if self._extractor is None:
            self._extractor = self._gallery.load_extractor(weights=self.config.weights)
        ids, paths = self._samples._root_dataset.select(list(samples), ordered=True).values(["id", "filepath"])
        if list(ids) != list(samples):
            raise OptionError(
                f"query: expected ids of samples, found {len(samples) - len(ids)} that the data set lacks"
            )
        spec, gate = self._gallery.spec, decoding_gate()
        contents = (content_of(*pair, "query another one") for pair in zip(ids, paths, strict=True))
        views = (
            view_of(content, path, spec.tiling, spec.bits, gate).views[0]
            for content, path in zip(contents, paths, strict=True)
        )
        batches = batched(views, self._extractor.batch_size)
        return np.concatenate([self._extractor.extract(batch).image for batch in batches])
