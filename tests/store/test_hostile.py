"""Files from anybody end in an answer or an error of the package: `fuzz.py` for seconds, and any JSON."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spade_faiss as sf
from spade_faiss.detect import calibration
from spade_faiss.extractors.networks import load_network
from spade_faiss.options import Patches
from spade_faiss.store import manifest
from spade_faiss.system.sealed_json import sealed
from tests.helpers.benchmarks import bit_rot, fuzz

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory) -> dict[Patches, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    both: tuple[Patches, Patches] = ("stored", "recompute")
    return {patches: bit_rot.make_gallery(folder / patches, patches) for patches in both}


@pytest.mark.slow
@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_whatever_is_changed_ends_in_an_answer_or_a_refusal(galleries: dict[Patches, Path], patches: Patches) -> None:
    kinds, first = list(fuzz.KINDS), {"stored": 7000, "recompute": 7048}[patches]  # eight of each kind
    found = list(fuzz.executions(galleries[patches], kinds, iter(range(first, first + 48)), seconds=60))
    assert [one for one in found if one[2] not in ("taken", "refused")] == []
    assert {kind for kind, _, _ in found} == set(kinds)


@pytest.mark.slow
@settings(max_examples=80)
@given(values=st.dictionaries(st.sampled_from(["image_scores", "settings", "generation", "baseline", "group"]), JSON))
def test_any_calibration_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    folder = tmp_path_factory.mktemp("calibration")
    calibration.Calibration(1, {}, 0.5, None, np.ones(3), np.ones(3)).write(folder)
    changed = json.loads((folder / calibration.FILE).read_bytes()) | values
    del changed["xxh3"]
    (folder / calibration.FILE).write_bytes(sealed(changed))
    try:
        calibration.Calibration.read(folder)
    except sf.CorruptGalleryError as error:
        assert "calibrate again" in str(error)  # noqa: PT017


@settings(max_examples=80)
@given(data=st.data())
def test_any_value_in_a_manifest_is_read_or_refused(galleries: dict[Patches, Path], data: st.DataObject) -> None:
    values = json.loads((galleries["stored"] / manifest.FILE).read_bytes())
    del values["xxh3"]
    places = list(fuzz._places(values))
    parent, key = places[data.draw(st.integers(0, len(places) - 1))]
    parent[key] = data.draw(JSON)
    folder = galleries["stored"].parent / "edited"
    folder.mkdir(exist_ok=True)
    (folder / manifest.FILE).write_text(json.dumps(values))
    try:
        read = manifest.Manifest.read(folder)
    except sf.CorruptGalleryError:
        return
    for entry in (*read.shards, read.index, read.keys):
        if entry is not None:
            assert (folder / entry.file).resolve().is_relative_to(folder.resolve())


class Evil:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("unpickled",))


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    torch.save({"weight": Evil()}, tmp_path / "weights.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("weights.pth", "bare.pth"):
        with pytest.raises(sf.SpadeError):
            load_network("resnet18", tmp_path / name, sf.FeatureOptions(device="cpu"))
