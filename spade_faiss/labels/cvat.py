"""CVAT's XML 1.1 for images."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from ..detect.regions import Region
from ..errors import OptionError, OutputError
from .outlines import joined, outlines
from .regions import LabelledImage, RegionMask
from .run_lengths import cvat_counts
from .shapes import Shapes

ATTRIBUTES = (  # of a region: those that a task's label does not have, CVAT passes over
    "peak", "pixel_threshold", "image_score", "image_threshold", "p_value", "generation",
)  # fmt: skip
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML cannot hold


def cvat(images: Iterable[LabelledImage], shapes: Shapes = "masks", label: str = "anomaly") -> bytes:
    """Return images and their regions as an XML file, which CVAT imports into a task of the same images.

    Args:
        images: to write; each is let go of before the next.
        shapes: "masks": run lengths; "polygons": outlines, with a cut to each hole, as CVAT's polygons have no holes.
        label: of the regions; the task must have it.

    Raises:
        OptionError: a label that XML cannot hold, or polygons without contourpy.
        OutputError: an image's name that XML cannot hold.
    """
    if found := NO_XML.search(label):
        raise OptionError(f"label: expected text that XML can hold, found the character {found[0]!r} in {label!r}")
    root = Element("annotations")
    _text(root, "version", "1.1")
    task = SubElement(SubElement(root, "meta"), "task")
    size = _text(task, "size", "")
    _text(task, "mode", "annotation")
    of_label = SubElement(SubElement(task, "labels"), "label")
    _text(of_label, "name", label)
    attributes = SubElement(of_label, "attributes")
    for name in ATTRIBUTES:
        facts = {"name": name, "mutable": "False", "input_type": "text", "default_value": "", "values": ""}
        attribute = SubElement(attributes, "attribute")
        for fact, text in facts.items():
            _text(attribute, fact, text)
    count = 0
    for image in images:
        _add(root, image, shapes, label)
        count += 1
    size.text = str(count)
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, "utf-8", xml_declaration=True)
    return content


def _text(parent: Element, name: str, text: str) -> Element:
    child = SubElement(parent, name)
    child.text = text
    return child


def _add(root: Element, image: LabelledImage, shapes: Shapes, label: str) -> None:
    if found := NO_XML.search(image.name):
        raise OutputError(
            f"{image.name!r}: expected a name that XML can hold, found the character {found[0]!r}; rename the file, or "
            "choose another format"
        )
    height, width = image.size
    given = {"id": str(image.number - 1), "name": image.name, "width": str(width), "height": str(height)}
    element = SubElement(root, "image", given)
    for region, mask in image.region_masks():
        common = {"label": label, "source": "auto", "occluded": "0", "z_order": "0"}
        if shapes == "masks":
            shape = SubElement(element, "mask", {**common, **_mask(mask)})
        else:
            [part] = outlines(mask.inside, mask.left, mask.top)  # a region is connected
            points = ";".join(f"{x:.2f},{y:.2f}" for x, y in joined(part))
            shape = SubElement(element, "polygon", {**common, "points": points})
        for name, value in _facts(image, region).items():
            attribute = SubElement(shape, "attribute", {"name": name})
            attribute.text = str(value)


def _mask(mask: RegionMask) -> dict[str, str]:
    height, width = mask.inside.shape
    return {
        "rle": ", ".join(map(str, cvat_counts(mask))),
        "left": str(mask.left),
        "top": str(mask.top),
        "width": str(width),
        "height": str(height),
    }


def _facts(image: LabelledImage, region: Region) -> dict[str, Any]:
    thresholds = image.thresholds or {}
    known = {
        "peak": region.peak,
        "pixel_threshold": thresholds.get("pixel"),
        "image_threshold": thresholds.get("image"),
        **{name: image.facts.get(name) for name in ("image_score", "p_value", "generation")},
    }
    return {name: known[name] for name in ATTRIBUTES if known[name] is not None}
