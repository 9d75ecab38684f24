"""The writing half of a gallery: images in and out, trust, compaction, the image index, repair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

from ..errors import FeatureError, OptionError
from ..extractors.features import Features
from ..extractors.registry import Extractor
from ..images.tiling import image_key, listed_keys
from ..index.factory import check_kind
from ..object_store.address import refuse_address
from ..store.locks import ReaderLock
from ..store.secondary_indexes import IndexState
from ..store.trusted import change_trusted, given_images
from ..store.writer import Appended, GalleryWriter
from .reader import GalleryReader
from .repair import Repair, repair


class GalleryEditor(GalleryReader):
    """What a Gallery changes in the gallery that it has open; see Gallery."""

    def append(
        self,
        keys: Sequence[str],
        features: Features,
        digests: Sequence[str] | None = None,
        replace: bool = False,
        timeout: float = 0,
    ) -> Appended:
        """Append the features of n images as one commit: all or none.

        Args:
            keys: n names, each once.
            features: of n images, of the gallery's spec.
            digests: n digests of the content that the features are of; None: of the features themselves.
            replace: put other content under an existing key in its place, rather than refuse it.
            timeout: seconds to wait for another process that is writing.

        Raises:
            FeatureError: wrong shapes, NaN or infinity, keys that do not fit.
            KeyConflictError: a key is there with other content.
            GalleryError: another process is writing, or the disk is full or refuses.
            SpecMismatchError: the gallery at this path was made again with another spec since it was opened.

        Example:
            >>> gallery.append(["black"], toy.extract([np.zeros((32, 32, 3), np.uint8)]))
            Appended(added=1, replaced=0, unchanged=0)
        """
        keys = listed_keys(keys, FeatureError)
        with self.writer(timeout) as writer:
            if writer.snapshot.manifest.spec.tile is not None:
                _require_whole_images(keys)
            return writer.append(keys, features, digests, replace)

    def remove(self, keys: Iterable[str], timeout: float = 0) -> None:
        """Remove images by key, without rewriting shards; see compact.

        Args:
            keys: of the images.
            timeout: seconds to wait for another process that is writing.

        Raises:
            GalleryLockedError: another process is writing.
            CorruptGalleryError: trusted.json was damaged or edited; then none is removed.
            GalleryError: the disk is full or refuses; then none is removed.
            OptionError: a key that is not in the gallery, or is that of a tile; then none is removed.

        Example:
            >>> gallery.remove(["000.png", "001.png"])
            >>> len(gallery)
            10
        """
        with self.writer(timeout) as writer:
            writer.remove(keys)

    def trust(self, keys: Iterable[str]) -> None:
        """Mark images as trusted: a person has looked at them and confirmed that they are normal.

        A recipe whose scores average over several neighbours (kappa above 1) wants several normal images of a kind
        before that kind is normal, because one of them may be an unseen defect. A trusted image is enough by itself: a
        patch whose nearest match lies in it has the distance to that match. Every Detector that is made from now on
        counts it so. `remove` ends it.

        Args:
            keys: of the images.

        Raises:
            OptionError: a key that is not in the gallery, or is that of a tile; then none is marked.
            CorruptGalleryError: trusted.json was damaged or edited.
            GalleryError: trusted.json cannot be written.

        Example:
            >>> gallery.trust(["003.png"])
            >>> gallery.trusted()
            ['003.png']
        """
        refuse_address(self.path)
        snapshot = self._snapshot
        ids = given_images(snapshot, keys)
        change_trusted(self._place, dict(zip(snapshot.keys(ids), snapshot.digests(ids), strict=True)))

    def distrust(self, keys: Iterable[str]) -> None:
        """Take trusted images for ordinary ones again.

        Args:
            keys: of the images; those that are not trusted are passed over.

        Raises:
            OptionError: something else than several texts.
            CorruptGalleryError: as trust.
            GalleryError: as trust.

        Example:
            >>> gallery.trust(["003.png", "004.png"])
            >>> gallery.distrust(["003.png"])
            >>> gallery.trusted()
            ['004.png']
        """
        refuse_address(self.path)
        keys = listed_keys(keys)
        for key in keys:
            if not isinstance(key, str):
                raise OptionError(f"keys: expected texts, found {key!r:.80}")
        change_trusted(self._place, drop=keys, tiles=self.spec.tile is not None)

    def compact(self, timeout: float = 0) -> int:
        """Rewrite shards that hold removed images or are small.

        Args:
            timeout: seconds to wait for another process that is writing.

        Returns:
            the bytes saved.

        Raises:
            GalleryLockedError: another process is writing.

        Example:
            >>> gallery.remove(["000.png"])
            >>> gallery.compact() > 0, gallery.info()["removed"]
            (True, 0)
        """
        with self.writer(timeout) as writer:
            return writer.compact()

    def reindex(self, kind: str | None = None, timeout: float = 0, **options: Any) -> IndexState:
        """Rebuild the image index from the shards, beside the old one, which readers go on using.

        Args:
            kind: see IndexOptions; None: the gallery's.
            timeout: seconds to wait for another process that is writing.
            options: memory, recall, nlist, nprobe, train_images of IndexOptions; None: the gallery's.

        Raises:
            GalleryLockedError: another process is writing.
            OptionError: FAISS has no such index, or it does not reach the recall; the old one stays.

        Example:
            >>> print(gallery.reindex("flat"))
            Flat, ...
        """
        given = {name: value for name, value in {"kind": kind, **options}.items() if value is not None}
        with self.writer(timeout) as writer:
            manifest = writer.snapshot.manifest.on(self._device)  # not what this object has open: it may be older
            new = with_changes(manifest.index_options, **given)
            check_kind(new, manifest.spec.image_dim)
            writer.write_index(new)
        return self.index_state()

    def rebuild_index(self) -> None:
        """Rebuild the image index with the gallery's own options.

        Example:
            >>> gallery.rebuild_index()
            >>> gallery.index_state().entry.images
            12
        """
        self.reindex()

    @contextmanager
    def writer(self, timeout: float = 0) -> Iterator[GalleryWriter]:
        """Write in several steps, which leaving the `with` statement commits; see GalleryWriter.

        Args:
            timeout: seconds to wait for another process that is writing.

        Raises:
            GalleryLockedError: it did not finish in time; the message has its process id.
            SpecMismatchError: the gallery at this path was made again with another spec since it was opened.

        Example:
            >>> with gallery.writer() as writer:
            ...     writer.remove(["000.png"])
            ...     _ = writer.append(["black"], toy.extract([np.zeros((32, 32, 3), np.uint8)]))
            >>> len(gallery), "black" in gallery
            (12, True)
        """
        refuse_address(self.path)
        spec, writing, before = self.spec, GalleryWriter(self._place, timeout), None
        try:
            with writing as writer:
                found = writer.snapshot.manifest
                found.spec.require(spec, f"{self.path}: made again with another spec since it was opened, refresh() it")
                before = found.generation
                yield writer
                writer.finish()
                self.refresh()
                # Files of older generations go, unless somebody still reads one. Nobody else can sweep meanwhile.
                self._snapshot.release()
                writer.sweep()
                self._snapshot.hold(ReaderLock(self._place))
        finally:
            # What failed before it had committed anything leaves this object at its generation.
            if before not in (None, writing.snapshot.manifest.generation):
                self.refresh()

    def repair(
        self,
        extractor: Extractor | None = None,
        normal: str | Path | Sequence[str | Path] = (),
        drop_unreadable: bool = False,
    ) -> Repair:
        """Mend what verify finds: rebuild image index and key table, re-extract damaged images from their files.

        What cannot be mended stays as it is, and verify goes on to report it; good images are not touched.

        Args:
            extractor: the one that made the gallery; None: damaged images are not re-extracted. See needs_extractor.
            normal: folders that the gallery was built from, or one of them. A file counts only if it has the digest
                that the gallery keeps.
            drop_unreadable: remove what is left: damaged images, and whole shards that cannot be opened. Their keys
                may be lost with them: add the images again.

        Raises:
            GalleryLockedError: another process is writing.
            SpecMismatchError: another extractor, or one with other settings.

        Example:
            >>> gallery.repair(toy, ["normal"])
            Repair(extracted=[], dropped=[], dropped_images=0, derived=False)
        """
        folders = [Path(folder) for folder in ([normal] if isinstance(normal, (str, Path)) else normal)]
        with self.writer() as writer:
            if extractor is not None:
                writer.snapshot.manifest.spec.require(extractor.spec, str(self.path))
            return repair(writer, extractor, folders, drop_unreadable)


def _require_whole_images(keys: Sequence[str]) -> None:
    """Refuse the key of a tile without its image's: it would be taken for a tile of whatever image has that key.

    Raises:
        FeatureError: there is one.
    """
    there = set(keys)
    for key in keys:
        if image_key(key) not in there:
            raise FeatureError(
                f"keys: expected all tiles of an image together, found {key!r} without {image_key(key)!r}; append them "
                "together, or give the image another key"
            )
