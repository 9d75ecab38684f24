"""What the tests share: random features, a folder of small images, a toy gallery of them; which of them need a GPU."""

from __future__ import annotations

import gc
import os

# Before NumPy, torch and FAISS are loaded: several workers share the cores, and at the size of these tests threads only
# wait for each other. Tests of threads ask for them by themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What `auto` would choose is a matter of time, and of what the user's cache folder has. Tests of runtimes choose.
os.environ["SPADE_FAISS_RUNTIME"] = "torch"

import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import without_faiss  # before the package: on a machine that was lent for its GPU there may be no FAISS

import spade_faiss as sf
from tests.helpers.command_line import Run, Spade
from tests.helpers.galleries import OWN, RandomFeatures, random_features_of
from tests.helpers.images import write_images
from tests.helpers.processes import FORKSERVER

MEMORY = Path("/dev/shm")  # where there is much of it, temporary files wait for no disk: an eighth of the suite's time
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= 4 * 2**30:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# The same inputs in every run, so that it fails by what was changed alone; HYPOTHESIS_PROFILE=random looks for others.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

GPUS = {"cuda": "torch sees no CUDA device", "faiss_gpu": "FAISS sees no GPU"}  # by marker: why it is not met
DESELECTED = pytest.StashKey[dict[str, int]]()  # items, by the reason


class Skipped(pytest.skip.Exception):  # type: ignore[misc]
    """Raised by whatever asks for FAISS where there is none."""

    def __init__(self, why: str) -> None:
        super().__init__(why, allow_module_level=True)


without_faiss.ERROR = Skipped


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "only the tests that need a GPU: those that this machine can run; the others are counted"
    parser.addoption("--gpu", action="store_true", help=text)


def unseen() -> dict[str, str]:
    """The markers that this machine does not meet, and why."""
    import faiss
    import torch

    seen = {"cuda": torch.cuda.is_available(), "faiss_gpu": getattr(faiss, "get_num_gpus", lambda: 0)() > 0}
    why = {**GPUS, "faiss_gpu": without_faiss.WHY} if without_faiss.is_missing() else GPUS
    return {marker: why[marker] for marker in GPUS if not seen[marker]}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --gpu, leave out modules without such a test: a lent machine may not have what they import."""
    if not config.getoption("--gpu"):
        return None
    modules = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    texts = (module.read_text(encoding="utf-8") for module in modules)
    return None if any(f"mark.{marker}" in text for text in texts for marker in GPUS) else True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With --gpu on a machine without one, all that it can run is nothing."""
    if session.config.getoption("--gpu") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_configure() -> None:
    """Whatever modules and items make, stays: looking for garbage there is a third of the time to collect them."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Thousands of items and all modules stay to the end: the garbage collector need not look at them again.

    Nor need it look at what tests keep as often as it does: at its own pace it takes a twentieth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU that is not there: counted, rather than skipped one by one."""
    needs = {item: [marker for marker in GPUS if item.get_closest_marker(marker)] for item in items}
    if config.getoption("--gpu"):
        config.hook.pytest_deselected(items=[item for item in items if not needs[item]])
        items[:] = [item for item in items if needs[item]]
    missing = unseen() if any(needs.values()) else {}
    why = {item: " and ".join(missing[marker] for marker in needs[item] if marker in missing) for item in items}
    left_out = [item for item in items if why[item]]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not why[item]]
    count = config.stash[DESELECTED] = dict(Counter(why[item] for item in left_out))
    if hasattr(config, "workeroutput"):  # a worker of pytest-xdist: its parent collects nothing, and says it all
        config.workeroutput["deselected"] = count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", {})  # each collects all


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for why, count in config.stash.get(DESELECTED, {}).items():
        terminalreporter.write_line(f"{count} tests that need a GPU were left out: {why}")


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What an earlier state of the code has kept in the user's is not used."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """On a busy machine, torch's threads wait for each other ten times longer than small networks take."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _quick_disk() -> Iterator[None]:
    """Flushing costs more than all else here, and no test cuts the power; child processes do flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For FAISS and torch, as a user's machine has several."""
    import faiss
    import torch

    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(2)
    torch.set_num_threads(2)
    yield
    faiss.omp_set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def own_spec() -> sf.ExtractorSpec:
    """Features that were not made from images here."""
    return OWN


@pytest.fixture(scope="session")
def random_features() -> RandomFeatures:
    return random_features_of


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 12)


@pytest.fixture(scope="session")
def toy() -> sf.Extractor:
    return sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))


@pytest.fixture
def toy_gallery(tmp_path: Path, image_folder: Path, toy: sf.Extractor) -> sf.Gallery:
    """A gallery of the 12 images in image_folder."""
    gallery = sf.Gallery.create(tmp_path / "toy.gallery", toy.spec, index=sf.IndexOptions(device="cpu"))
    gallery.add_images(image_folder, toy)
    return gallery


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from a process that has imported everything; other tests start them as the package does."""
    monkeypatch.setattr("spade_faiss.ingest.workers.SPAWN", FORKSERVER)


@pytest.fixture
def spade(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Spade:
    """Run the command line in this process, where torch is loaded already."""
    from spade_faiss.cli.main import main

    def run(*args: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["spade-faiss", *map(str, args)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() has its own
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capfd.readouterr()
        return Run(int(stopped.value.code or 0), captured.out, captured.err)

    return run
