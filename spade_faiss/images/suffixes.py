"""Which file names belong to images: by the suffixes of the formats that Pillow opens here."""

from __future__ import annotations

from PIL import Image

FORMATS = frozenset(
    {
        "AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI",
        "SUN", "TGA", "TIFF", "WEBP",
    }
)  # fmt: skip
SHARED = {"MPO": "JPEG"}  # formats that another format's opener opens
NEVER = frozenset({".pfm"})  # floating point, which is not decoded
SHOWN = ".bmp .gif .jpeg .jpg .png .tif .tiff .webp and others that Pillow opens"

# Pictures and videos that people have beside images, and that no decoder here turns into pixels.
_CAMERAS = "3fr arw cr2 cr3 crw dcr dng erf iiq k25 kdc mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
_FILMS = "avi flv insp m2ts m4v mkv mov mp4 mpeg mpg mts ts webm wmv"
_PICTURES = (
    "ai apng avif avifs cur dcm dds emf eps exr fit fits hdr heic heif hif icns ico j2c j2k jp2 jpc jpf jpx jxl jxr "
    "pdf pfm psb psd qoi svg wdp wmf xcf"
)
UNREAD = frozenset(f".{name}" for name in f"{_CAMERAS} {_FILMS} {_PICTURES}".split())


def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case with the dot, of images that this installation decodes.

    A format whose decoder is missing, as AVIF may be, is not among them. One that a plugin adds, as pillow-heif does,
    is.
    """
    Image.init()
    known = Image.registered_extensions()
    return frozenset(
        suffix
        for suffix, name in known.items()
        if name in FORMATS and SHARED.get(name, name) in Image.OPEN and suffix not in NEVER
    )
