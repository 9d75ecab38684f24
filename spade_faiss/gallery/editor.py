"""The writing half of a gallery: images in and out, trust, compaction, the image index, repair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..extractors.features import Features
from ..extractors.registry import Extractor
from ..index.factory import check_kind
from ..object_store.address import refuse_address
from ..store.locks import ReaderLock
from ..store.secondary_indexes import IndexState
from ..store.trusted import change_trusted, read_trusted
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

        Example:
            >>> gallery.append(["black"], toy.extract([np.zeros((32, 32, 3), np.uint8)]))
            Appended(added=1, replaced=0, unchanged=0)
        """
        with self.writer(timeout) as writer:
            return writer.append(keys, features, digests, replace)

    def remove(self, keys: Sequence[str], timeout: float = 0) -> None:
        """Remove images by key, without rewriting shards; see compact.

        Args:
            keys: of the images.
            timeout: seconds to wait for another process that is writing.

        Raises:
            GalleryLockedError: another process is writing.
            CorruptGalleryError: trusted.json was damaged or edited; then none is removed.
            OptionError: a key that is not in the gallery; then none is removed.

        Example:
            >>> gallery.remove(["000.png", "001.png"])
            >>> len(gallery)
            10
        """
        read_trusted(self.path)  # before anything is removed
        with self.writer(timeout) as writer:
            writer.remove(keys)
        change_trusted(self.path, drop=keys)

    def trust(self, keys: Sequence[str]) -> None:
        """Mark images as trusted: a person has looked at them and confirmed that they are normal.

        A recipe whose scores average over several neighbours (kappa above 1) wants several normal images of a kind
        before that kind is normal, because one of them may be an unseen defect. A trusted image is enough by itself: a
        patch whose nearest match lies in it has the distance to that match. Every Detector that is made from now on
        counts it so. `remove` ends it.

        Args:
            keys: of the images.

        Raises:
            OptionError: a key that is not in the gallery; then none is marked.
            CorruptGalleryError: trusted.json was damaged or edited.
            GalleryError: trusted.json cannot be written.

        Example:
            >>> gallery.trust(["003.png"])
            >>> gallery.trusted()
            ['003.png']
        """
        refuse_address(self.path)
        snapshot = self._snapshot
        found = snapshot.find_all(keys)
        if None in found:
            key = keys[found.index(None)]
            raise OptionError(f"{self.path}: expected keys of images in it, found {key!r}, which is not")
        ids = [row_id for row_id in found if row_id is not None]
        change_trusted(self.path, dict(zip(snapshot.keys(ids), snapshot.digests(ids), strict=True)))

    def distrust(self, keys: Sequence[str]) -> None:
        """Take trusted images for ordinary ones again.

        Args:
            keys: of the images; those that are not trusted are passed over.

        Raises:
            CorruptGalleryError: as trust.
            GalleryError: as trust.

        Example:
            >>> gallery.trust(["003.png", "004.png"])
            >>> gallery.distrust(["003.png"])
            >>> gallery.trusted()
            ['004.png']
        """
        refuse_address(self.path)
        change_trusted(self.path, drop=keys)

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
        old = self._snapshot.manifest.index_options
        given = {"kind": kind, **options}
        new = with_changes(old, **{name: value for name, value in given.items() if value is not None})
        check_kind(new, self.spec.image_dim)
        with self.writer(timeout) as writer:
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

        Example:
            >>> with gallery.writer() as writer:
            ...     writer.remove(["000.png"])
            ...     _ = writer.append(["black"], toy.extract([np.zeros((32, 32, 3), np.uint8)]))
            >>> len(gallery), "black" in gallery
            (12, True)
        """
        refuse_address(self.path)
        try:
            with GalleryWriter(self.path, timeout) as writer:
                yield writer
                writer.finish()
                self.refresh()
                # Files of older generations go, unless somebody still reads one. Nobody else can sweep meanwhile.
                self._snapshot.release()
                writer.sweep()
                self._snapshot.hold(ReaderLock(self.path))
        finally:
            self.refresh()

    def repair(
        self,
        extractor: Extractor | None = None,
        normal: Sequence[str | Path] = (),
        drop_unreadable: bool = False,
    ) -> Repair:
        """Mend what verify finds: rebuild image index and key table, re-extract damaged images from their files.

        What cannot be mended stays as it is, and verify goes on to report it; good images are not touched.

        Args:
            extractor: the one that made the gallery; None: damaged images are not re-extracted. See needs_extractor.
            normal: folders that the gallery was built from. A file counts only if it has the digest that the gallery
                keeps.
            drop_unreadable: remove what is left: damaged images, and whole shards that cannot be opened. Their keys
                may be lost with them: add the images again.

        Raises:
            GalleryLockedError: another process is writing.
            SpecMismatchError: another extractor, or one with other settings.

        Example:
            >>> gallery.repair(toy, ["normal"])
            Repair(extracted=[], dropped=[], dropped_images=0, derived=False)
        """
        if extractor is not None:
            self.spec.require(extractor.spec, str(self.path))
        with self.writer() as writer:
            return repair(writer, extractor, [Path(folder) for folder in normal], drop_unreadable)
