"""Every error that spade-faiss raises on purpose, as a tree.

SpadeError
├── OptionError           (ValueError)         a setting outside its range, or two that contradict each other
├── ImageError            (ValueError)         one image that cannot be read or used
├── FeatureError          (ValueError)         arrays of the wrong shape or dtype, NaN, infinity
├── WeightsError          (FileNotFoundError)  a network's weights are missing or do not fit it
├── DeviceError           (RuntimeError)       a device that was named and does not exist
├── NotEnoughImagesError  (ValueError)         K is larger than the number of normal images
├── WorkerError           (RuntimeError)       a worker process could not start, was killed or failed
├── OutputError           (OSError)            a result, report, picture or curve that cannot be written
├── ResultsError          (ValueError)         a result folder that is none, unfinished, damaged or of another release
└── GalleryError          (OSError)            a gallery that cannot be opened, read or written
    ├── GalleryNotFoundError  (FileNotFoundError)
    ├── CorruptGalleryError                    a file that is missing, cut short or changed
    ├── SourceError                            an image file that patches are recomputed from is gone or has changed
    ├── SpecMismatchError     (ValueError)     features of another extractor or other settings
    ├── KeyConflictError      (ValueError)     a key that exists with other content
    ├── MemberError           (RuntimeError)   a member of a cluster that is lost, or not as the cluster knows it
    └── GalleryLockedError    (BlockingIOError) another process is writing

Each is also the builtin that a caller would catch. A message is one line: what was expected, what was found, where,
and what to do. It names parameters of the Python interface, as `timeout=SECONDS`.
"""

from __future__ import annotations


class SpadeError(Exception):
    """Base of every error that spade-faiss raises on purpose."""

    def __str__(self) -> str:
        return " ".join(str(arg) for arg in self.args)


class OptionError(SpadeError, ValueError):
    """A setting outside its range, or two settings that contradict each other."""


class ImageError(SpadeError, ValueError):
    """One image that cannot be read or used: the message starts with its path."""


class FeatureError(SpadeError, ValueError):
    """Arrays of the wrong shape or dtype, or with NaN or infinity in them."""


class WeightsError(SpadeError, FileNotFoundError):
    """A network's weights are missing or do not fit it."""


class DeviceError(SpadeError, RuntimeError):
    """A device that was named and does not exist."""


class NotEnoughImagesError(SpadeError, ValueError):
    """More neighbours were asked for than there are normal images."""


class WorkerError(SpadeError, RuntimeError):
    """A worker process could not start, was killed or failed."""


class OutputError(SpadeError, OSError):
    """A result, report, picture or curve that cannot be written."""


class ResultsError(SpadeError, ValueError):
    """A result folder that is not one, unfinished, damaged or of another release."""


class GalleryError(SpadeError, OSError):
    """A gallery that cannot be opened, read or written."""


class GalleryNotFoundError(GalleryError, FileNotFoundError):
    """There is no gallery at that path."""


class CorruptGalleryError(GalleryError):
    """A file of the gallery is missing, cut short or changed."""


class SourceError(GalleryError):
    """An image file that the gallery recomputes patches from is gone or has changed."""


class SpecMismatchError(GalleryError, ValueError):
    """Features of another extractor, or made with other settings, than the gallery's."""


class KeyConflictError(GalleryError, ValueError):
    """A key that exists with other content."""


class MemberError(GalleryError, RuntimeError):
    """A member of a cluster is lost, or is not as the cluster knows it."""


class GalleryLockedError(GalleryError, BlockingIOError):
    """Another process is writing to the gallery."""


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
