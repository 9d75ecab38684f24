"""The documentation: links resolve, code runs, the page of the command line is the program's, the site builds."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps

import spade_faiss as sf
from spade_faiss import errors
from spade_faiss.cli import cli
from tests.helpers.processes import run

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SAMPLES = ROOT / "data" / "samples"
HOME = "https://github.com/spade-faiss/spade-faiss"

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
OTHERS = [
    ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "data/README.md", "examples/README.md")
]

NORMAL = 51  # images: one more than the default K
SIDE = 96  # px of an image, and QUICK of what the toy extractor sees
QUICK = 32


def name_of(path: Path) -> str:
    """A page as pytest shows it."""
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and the line that its code begins on."""

    language: str
    line: int
    code: str


def blocks_of(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in some languages."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(r"^```(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            found.append(Block(match[1], text[: match.start(2)].count("\n"), match[2]))
    return found


def without_blocks(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The commands in the shell blocks of a page, split into words."""
    code = "".join(block.code for block in blocks_of(page, "sh", "console")).replace("\\\n", " ")
    lines = (shlex.split(line.removeprefix("$ "), comments=True) for line in code.splitlines())
    return [words for words in lines if words]


# Links


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    prose = re.sub(r"(`+)[^`].*?\1", "", without_blocks(page))
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in links_of(page):
        if (own := re.fullmatch(rf"{HOME}/(?:blob|tree)/main/(.+)", link)) is not None:
            target, anchor = ROOT / own[1], ""
        elif re.match(r"https?:|mailto:", link):
            continue
        else:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_readme() -> None:
    linked = {link.partition("#")[0] for link in links_of(ROOT / "README.md")}
    pages = {name_of(page) for page in DOCS.glob("*.md")}
    assert pages - linked == {"docs/index.md", "docs/reference.md"}  # the site's own


# Code


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages assume: tiles/ in the layout of MVTec AD, and more/good, all of the sample set."""
    folder = tmp_path_factory.mktemp("images")

    def write(image: Image.Image, name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(folder / name)

    normal = [Image.open(path).copy() for path in sorted((SAMPLES / "train" / "good").iterdir())]
    normal += [ImageOps.mirror(image) for image in normal]
    for number, image in enumerate(normal[: NORMAL + 3]):
        write(image, f"{'tiles/train' if number < NORMAL else 'more'}/good/{number:03d}.jpg")
    for number in range(2):
        write(Image.open(SAMPLES / f"test/good/{number:03d}.jpg"), f"tiles/test/good/{number:03d}.jpg")
        write(Image.open(SAMPLES / f"test/misweave/{number:03d}.jpg"), f"tiles/test/crack/{number:03d}.jpg")
        mask = Image.open(SAMPLES / f"ground_truth/misweave/{number:03d}_mask.png")
        write(mask, f"tiles/ground_truth/crack/{number:03d}_mask.png")
    return folder


def run_commands(page: Path) -> None:
    """Run the spade-faiss commands of a page in the current folder, with a small toy for an extractor."""
    for program, *words in commands_of(page):
        if program == "spade-faiss":
            small = ["--extractor", "toy", "--image-size", str(QUICK)] if words[0] == "build" else []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notes on stderr, such as that a calibration is stale
                result = CliRunner().invoke(cli, [*words, *small])
            assert result.exit_code == 0, f"{' '.join(words)}: {result.output}{result.exception!r}"


@pytest.fixture(scope="module")
def workspace(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quickstart leaves: a calibrated gallery and results."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(images, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_commands(DOCS / "quickstart.md")
    return folder


def test_the_quickstart_leaves_a_gallery_and_results(workspace: Path) -> None:
    with sf.Gallery.open(workspace / "tiles.gallery") as gallery:
        assert len(gallery) == NORMAL + 3 - 1  # one was removed
    assert {"report.html", "results.jsonl", "maps"} <= {path.name for path in (workspace / "results").iterdir()}
    assert (workspace / "tiles.gallery" / "calibration.json").exists()


def test_the_commands_of_the_readme_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_commands(ROOT / "README.md")


@pytest.fixture
def quick_extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `sf.load_extractor` load a small toy, whatever its name."""
    load = sf.load_extractor

    def quick(name: str = "", weights: Any = None, options: sf.FeatureOptions | None = None) -> sf.Extractor:
        options = options or sf.FeatureOptions()
        return load("toy", options=dataclasses.replace(options, image_size=QUICK, crop=None))

    monkeypatch.setattr(sf, "load_extractor", quick)


NEEDS = {  # packages of environments of their own: `make test-anomalib`, `make test-fiftyone`
    "docs/anomalib.md": "anomalib",
    "docs/fiftyone.md": "fiftyone",
}


@pytest.mark.usefixtures("quick_extractors")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")], ids=name_of)
def test_python_runs(page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (needed := NEEDS.get(name_of(page))) is not None:
        warnings.simplefilter("ignore")  # its own; pytest restores them
        pytest.importorskip(needed)
    blocks = blocks_of(page, "python")
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "results" / "run.json"  # as if the commands had run here
    record.write_text(record.read_text().replace(json.dumps(str(workspace)), json.dumps(str(tmp_path))))
    if any('create("tiles.gallery"' in block.code for block in blocks):
        shutil.rmtree(tmp_path / "tiles.gallery")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


def context_of(words: list[str]) -> click.Context:
    """Parse a command without running it."""
    command: click.Command = cli
    context = click.Context(cli, info_name="spade-faiss")
    while isinstance(command, click.Group):
        name, *words = words
        member = command.get_command(context, name)
        assert member is not None, f"no command {name}"
        context = click.Context(command, info_name=name, parent=context)
        command = member
    return command.make_context(context.info_name, words, parent=context)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for program, *words in commands_of(page):
        if program == "spade-faiss":
            context_of(words)
        elif program == "make":
            assert words[0] in targets
        elif program == "python":
            assert (ROOT / words[0]).is_file()


def test_a_command_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(click.UsageError):
        context_of(["build", "tiles.gallery", "tiles", "--no-such-option"])
    with pytest.raises(AssertionError, match="no command"):
        context_of(["no-such-command"])


# Pages that follow the program


def script(name: str) -> ModuleType:
    """A script of docs/, which no package holds, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "name"), [("cli.md", "generate_cli"), ("inputs.md", "generate_inputs")])
def test_a_page_that_a_script_makes_is_what_it_makes(page: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line has its own
    assert (DOCS / page).read_text(encoding="utf-8") == script(name).page(), f"run `python docs/{name}.py`"


def test_every_command_and_option_is_on_that_page() -> None:
    page, context = (DOCS / "cli.md").read_text(encoding="utf-8"), click.Context(cli)
    for name in cli.list_commands(context):
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        command = cli.get_command(context, name)
        assert command is not None
        options = [parameter.opts[-1] for parameter in command.params if isinstance(parameter, click.Option)]
        assert [option for option in options if f"`{option}" not in section[1] and f"{option} " not in section[1]] == []


@pytest.mark.parametrize("options", [sf.FeatureOptions, sf.IndexOptions, sf.SearchOptions, sf.ScoreOptions])
def test_every_option_is_described_with_its_default(options: Any) -> None:
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    table = page.partition(f"\n`{options.__name__}` ")[2].partition("\n\n`")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
    expected = {}
    for field in dataclasses.fields(options):
        default: Any = field.default
        shown = f'`"{default}"`' if isinstance(default, str) else f"`{default!r}`"
        expected[field.name] = f"{default // 2**20} MiB" if field.name.endswith("_bytes") else shown
    assert rows == expected


def test_the_reference_has_every_public_name() -> None:
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\.\. \S+:: spade_faiss\.(\w+)$", page, re.MULTILINE)) == sorted(sf.__all__)


def test_the_errors_are_drawn_as_they_are() -> None:
    def drawn(text: str) -> list[str]:
        return re.findall(r"^[│├└─ ]*(\w+Error)\b(?: *\((\w+)\))?", text, re.MULTILINE)

    page = (DOCS / "python.md").read_text(encoding="utf-8").partition("## Errors")[2]
    assert drawn(page) == drawn(str(errors.__doc__))


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {sf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{sf.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_forges_run_what_people_run() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = set(re.findall(r"run: make (\w+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text()))
    assert {"lint", "test", "docs"} <= runs <= targets


# The site


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    options = ["--fail-on-warning", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    code = "import sys; from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))"
    done = run(code, *options, DOCS, tmp_path / "html")
    assert (done.returncode, done.stderr) == (0, "")
    built = {path.stem for path in (tmp_path / "html").glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} <= built


def test_the_map_of_the_house_has_every_module() -> None:
    """docs/architecture.md lists the modules of each room."""
    rows = re.findall(r"^\| `([\w/]+)` \| [^|]* \| ([^|]*) \|$", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    named = {room: set(re.findall(r"`(\w+)`", modules)) for room, modules in rows}
    package = ROOT / "spade_faiss"
    rooms = {path.parent for path in package.rglob("*.py")} - {package}
    assert {room.relative_to(package).as_posix() for room in rooms} <= set(named)
    for room in rooms:
        modules = {path.stem for path in room.glob("*.py")} - {"__init__", "__main__"}
        assert named[room.relative_to(package).as_posix()] == modules, room
