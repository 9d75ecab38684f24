"""The benchmark of quality stays alive: PatchCore beside anomalib's, intervals, families, a small run that goes on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import spade_faiss as sf
from spade_faiss.cli import bench
from spade_faiss.cli.main import cli

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "samples"

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


OWN = ("common", "quality", "quality_stats", "quality_patchcore")  # common knows the folder of results from its import


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give back what a benchmark, which has the process to itself, changes; import its modules anew."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [str(bench.benchmark_folder()), *sys.path])
    monkeypatch.setenv(bench.OUTPUT, str(tmp_path))
    before = {name: sys.modules.pop(name) for name in OWN if name in sys.modules}
    yield
    for name in OWN:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def patchcore() -> ModuleType:
    import quality_patchcore

    return quality_patchcore


@pytest.fixture
def stats() -> ModuleType:
    import quality_stats

    return quality_stats


@pytest.fixture
def toy() -> sf.Extractor:
    return sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64, strides=(8, 16), dtype="float32"))


def views(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, 256, (16, 16, 3), np.uint8), np.ones((4, 4, 1), np.uint8)) for _ in range(count)]


def test_patches_are_two_levels_averaged_and_joined(patchcore: ModuleType, toy: sf.Extractor) -> None:
    [image] = views(1, 0)
    fine, coarse = (level[0].transpose(1, 2, 0) for level in toy.extract([image]).levels)
    found = patchcore.PlainPatchCore(toy).embed([image])[0].numpy()
    assert found.shape == (8, 8, 6)
    around = fine[2:5, 3:6].mean(axis=(0, 1))
    np.testing.assert_allclose(found[3, 4, :3], around, rtol=1e-5)
    np.testing.assert_allclose(found[0, 0, :3], fine[:2, :2].sum(axis=(0, 1)) / 9, rtol=1e-5)  # zeros around it count
    np.testing.assert_allclose(found[0, 0, 3:], coarse[:2, :2].sum(axis=(0, 1)) / 9, rtol=1e-5)


def test_coreset_covers_as_greedy_k_centre_does(patchcore: ModuleType) -> None:
    patches = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32))
    chosen = patchcore.coreset(patches, 0.05, torch.Generator().manual_seed(3)).tolist()
    assert len(set(chosen)) == 15
    for count in range(1, 15):  # each is the farthest from those before it
        nearest = torch.cdist(patches, patches[chosen[:count]]).amin(1)
        assert float(nearest[chosen[count]]) == pytest.approx(float(nearest.max()), rel=1e-5)
    wide = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    assert len(patchcore.coreset(wide, 0.001, torch.Generator())) == 1
    assert len(set(patchcore.coreset(torch.zeros(20, 3), 0.5, torch.Generator()).tolist())) == 10  # all are equal


def test_a_patch_of_the_bank_is_at_no_distance(patchcore: ModuleType, toy: sf.Extractor) -> None:
    model = patchcore.PlainPatchCore(toy, ratio=1.0)
    normal, strange = views(3, 0), views(1, 9)
    model.fit([normal[:2], normal[2:]])
    assert model.bank.shape == (3 * 64, 6)
    assert float(model.distances(normal).max()) < 1e-5
    [(score, scores)] = model.score(strange, [(30, 50)])
    assert scores.shape == (30, 50)
    expected = torch.cdist(model.embed(strange).flatten(0, 2), model.bank).amin(1).square()
    assert score == pytest.approx(float(expected.max()), rel=1e-4)
    assert 0 < scores.max() < score  # it is smoothed


@pytest.mark.filterwarnings("ignore")  # anomalib's imports warn
def test_equals_anomalibs(patchcore: ModuleType, toy: sf.Extractor) -> None:
    pytest.importorskip("anomalib", minversion="2.7")
    normal, strange, sizes = views(6, 0), views(3, 9), [(64, 64)] * 3
    other = patchcore.AnomalibPatchCore(toy, ratio=0.2, neighbours=1)
    plain = patchcore.PlainPatchCore(toy, ratio=0.2)
    for model in (plain, other):
        model.fit([normal[:4], normal[4:]])
    assert len(plain.bank) == len(other.model.memory_bank)
    patches = plain.embed(normal).flatten(0, 2)
    radius = [float(torch.cdist(patches, bank).amin(1).max()) for bank in (plain.bank, other.model.memory_bank)]
    assert radius[0] == pytest.approx(radius[1], rel=0.25)  # from other first patches
    plain.bank = other.model.memory_bank  # from here on there is nothing random
    for (score, scores), (theirs, their_scores) in zip(
        plain.score(strange, sizes), other.score(strange, sizes), strict=True
    ):
        assert score**0.5 == pytest.approx(theirs, rel=1e-4)
        assert np.corrcoef(np.sqrt(scores).ravel(), their_scores.ravel())[0, 1] > 0.95  # theirs upsamples in squares


def test_intervals_are_those_of_the_resampled_images(stats: ModuleType) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 60])
    scores = rng.standard_normal(100) + labels
    drawn = stats.resampled_auroc(scores, labels, 1000, "tiles")
    assert drawn.shape == (1000,)
    assert drawn.mean() == pytest.approx((scores[40:, None] > scores[:40]).mean(), abs=0.01)
    assert 0.03 < drawn.std() < 0.07  # Hanley and McNeil's formula gives 0.046
    np.testing.assert_array_equal(drawn, stats.resampled_auroc(scores, labels, 1000, "tiles"))
    assert stats.resampled_auroc([1, 1, 1], [0, 1, 1], 10, "ties").tolist() == [0.5] * 10
    assert stats.resampled_auroc([0, 1, 2], [0, 1, 1], 10, "all right").tolist() == [1] * 10


def test_families(stats: ModuleType) -> None:
    names = ["pipe_a", "pipe_b", "tile", "nut_x"]
    assert stats.families_of(names) == {"pipe_a": "pipe", "pipe_b": "pipe", "tile": "tile", "nut_x": "nut_x"}
    rules = [stats.family_rule("(nut|tile)=parts")]
    assert set(stats.families_of(names, rules).values()) == {"pipe", "parts"}
    for wrong in ("pipe", "=parts", "(=parts"):
        with pytest.raises(ValueError, match="expected"):
            stats.family_rule(wrong)


def test_families_count_once_and_sets_within_them(stats: ModuleType) -> None:
    run = {"extractor": "toy", "shots": 3, "contaminate": 0.0, "seed": 0, "limit_test": None, "image_size": None}
    metrics = dict.fromkeys(stats.METRICS, None)
    rows = []
    for name, auroc in (("pipe_a", 1.0), ("pipe_b", 0.5), ("tile", 0.0)):
        scores = {1.0: [0, 1], 0.5: [1, 1], 0.0: [1, 0]}[auroc]
        for method in ("patchcore", "robust"):
            row = {"set": name, "method": method, **run, **metrics, "image_AUROC": auroc}
            rows.append({**row, "scores": scores, "labels": [0, 1]})
    shown, families = stats.summary(rows, stats.families_of(row["set"] for row in rows), 20)
    assert "scores" not in shown[0]
    assert shown[0]["image_AUROC_95"] == [1.0, 1.0]
    found = {(row["family"], row["method"]): row for row in families}
    assert found["pipe", "robust"]["image_AUROC"] == 0.75
    assert found["pipe", "robust"]["image_AUROC_95"] == [0.75, 0.75]
    assert found["all families", "robust"]["image_AUROC"] == 0.375
    assert found["all families", "robust"]["image_AUROC_over_patchcore_95"] == [0, 0]
    assert found["all families", "patchcore"]["image_AUROC_over_patchcore_95"] is None


def test_a_recipe_that_the_extractor_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import quality

    robust = sf.RECIPES["robust"]
    features = dataclasses.replace(robust.features, levels=("a level of a vision transformer",))
    monkeypatch.setitem(sf.RECIPES, "rad", dataclasses.replace(robust, name="rad", features=features))
    monkeypatch.setattr(quality, "has_anomalib", lambda: False)
    given = {"extractor": "toy", "weights": None, "device": "cpu", "image_size": 64, "only": None}
    assert quality.Methods(argparse.Namespace(**given)).names == [
        *(name for name in sf.RECIPES if name != "rad"),
        "wary_calibrated",
        "patchcore",
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("recipe rad: left out, as toy does not fit it: levels: expected some of")
    assert said[1] == "patchcore_anomalib: left out; pip install 'spade-faiss[peers]'"


def test_a_run_leaves_results_and_goes_on(tmp_path: Path) -> None:
    words = ["bench", "--output", str(tmp_path), "quality", str(SAMPLES), "--extractor", "toy", "--image-size", "64"]
    words += ["--limit-test", "4", "--only", "paper", "wary_calibrated", "patchcore", "--shots", "10", "50"]
    for _ in range(2):
        run = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert "samples: 50 shots: left out, as it has 40 normal images" in run.output
        lines = [json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines()]
        assert [(line["method"], line["contaminate"], line["trained"]) for line in lines] == [
            (method, share, trained)
            for share, trained in ((0.0, 10), (0.05, 11))
            for method in ("paper", "wary_calibrated", "patchcore")
        ]  # fmt: skip
    result = json.loads((tmp_path / "quality.json").read_text())
    assert {(one["test_normal"], one["test_anomalous"]) for one in result["sets"]} == {(2, 2)}
    assert all(0 <= one["pixel_AUPRO"] <= 1 for one in result["sets"])
    assert {one["family"] for one in result["families"]} == {"samples", "all families"}
    assert result["machine"]["cores"] >= 1
