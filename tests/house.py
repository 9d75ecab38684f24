"""The order of the house: which room may import from which, and how large a file or a function may be.

`python tests/house.py [PACKAGE]` counts rooms, files and arrows (imports between files), and lists what is against the
order, or too large in the package and in the folders beside it. docs/architecture.md says what each room is for.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "spade_faiss"

GROUND = ("_version", "errors", "options", "recipes", "arrays")  # modules beside the rooms
ROOMS = (
    *GROUND, "system", "images", "extractors", "index", "store", "object_store", "pyramids", "ingest", "gallery",
    "patch_search", "detect", "datasets", "metrics", "report", "labels", "evaluate", "repeats", "cluster", "service",
    "adapters", "cli",
)  # fmt: skip
ONLY = {  # rooms that stand on less than all of those before them
    "index": {*GROUND, "system"},
    "patch_search": {*GROUND, "system"},
    "datasets": {*GROUND, "system", "images"},
    "metrics": {*GROUND, "system"},
}
WITHIN = {  # rooms within a room, in order
    "patch_search": ("pyramid", "bounds", "window", "gpu"),
    "service": ("log", "web"),
}

BESIDE = ("tests", "benchmarks", "docs", "deploy", "examples")  # the folders of programs beside the package
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 70, 6
KERNELS = ("jit", "njit")  # decorators of compiled functions, which have as many parameters as they have arrays


def imports(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """Every import of a file from its own package, nested ones and those for types too: (line, dotted module)."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("spade_faiss"))
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else ()
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if module.startswith("spade_faiss"):
                # `from . import a` names modules, `from .a import b` one module and what is in it.
                known = [f"{module}.{alias.name}" for alias in node.names]
                yield from ((node.lineno, name if _is_module(name, package) else module) for name in known)


def _is_module(name: str, package: Path) -> bool:
    path = package.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def violations(package: Path = PACKAGE) -> list[str]:
    """Each import against the order, as a line that says where, what and why."""
    found = []
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue  # the contents page stands above all rooms
        where = path.relative_to(package.parent).as_posix()
        if own not in ROOMS:
            found.append(f"{where}: expected a room of ROOMS in {Path(__file__).name}, found {own}")
            continue
        allowed = ONLY.get(own, set(ROOMS[: ROOMS.index(own)])) | {own}
        inner = _inner_rooms(path.relative_to(package).parts)
        for line, module in imports(path, package):
            _, room, name, *_ = *module.split("."), "", ""
            if room not in allowed:
                may = ", ".join(sorted(allowed))
                found.append(f"{where}:{line}: {own} imports {module}, but may import only {may}")
            elif room == own and name in WITHIN.get(own, ()) and name not in inner:
                found.append(f"{where}:{line}: {path.parent.name} imports {module}, which comes after it in {own}")
    return found


def _inner_rooms(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The rooms within its room that a file may import from: modules beside them, from all."""
    room, inner = parts[0], WITHIN.get(parts[0], ())
    return inner if len(parts) < 3 or room not in WITHIN else inner[: inner.index(parts[1]) + 1]


def arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    """The files that each file imports from, by dotted module; contents pages (`__init__`) left out."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if path.name != "__init__.py":
            found[name] = {module for _, module in imports(path, package)} - {name}
    return found


def circles(package: Path = PACKAGE) -> list[list[str]]:
    """Circles of imports between files, each as the modules along it."""
    edges, found, done = arrows(package), list[list[str]](), set[str]()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(trail[trail.index(name) :])
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    return found


def oversized(package: Path = PACKAGE) -> list[str]:
    """Files and functions over the limits, but for compiled kernels and for the parameters of the public face.

    The folders beside the package have the limits of lines. A test has as many parameters as it has fixtures and cases.
    """
    found, names = [], _public(package)
    for folder in (package, *(package.parent / name for name in BESIDE)):
        for path in sorted(folder.rglob("*.py")):
            text, where = path.read_text(encoding="utf-8"), path.relative_to(package.parent).as_posix()
            if (lines := len(text.splitlines())) > FILE_LINES:
                found.append(f"{where}: {lines} lines, more than {FILE_LINES}")
            for function, public in _functions(ast.parse(text), names):
                over = _over(function, any_parameters=public or folder is not package)
                found += [f"{where}:{function.lineno}: {function.name}: {what}" for what in over]
    return found


def _over(function: ast.FunctionDef, any_parameters: bool) -> Iterator[str]:
    """What of a function is over the limits."""
    if _is_kernel(function):
        return
    if (lines := (function.end_lineno or 0) + 1 - function.lineno) > FUNCTION_LINES:
        yield f"{lines} lines, more than {FUNCTION_LINES}"
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    count = len([name for name in names if name not in ("self", "cls")])
    if count > PARAMETERS and not any_parameters:
        yield f"{count} parameters, more than {PARAMETERS}"


def _public(package: Path) -> set[str]:
    """The names on the contents page."""
    page = package / "__init__.py"
    body = ast.parse(page.read_text(encoding="utf-8")).body if page.exists() else []
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _functions(tree: ast.AST, public: set[str], inside: bool = False) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """All functions of a tree, and whether each is one that users call."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            private = node.name.startswith("_") and node.name != "__init__"
            yield node, (inside and not private) or (isinstance(tree, ast.Module) and node.name in public)
            yield from _functions(node, public)
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, public, node.name in public)
        else:
            yield from _functions(node, public, inside)


def _is_kernel(function: ast.FunctionDef) -> bool:
    names = {ast.unparse(one).partition("(")[0].rpartition(".")[2] for one in function.decorator_list}
    return bool(names & {*KERNELS, "intrinsic"})


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    edges, against = arrows(package), violations(package)
    rooms = [path for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    print(f"{len(rooms)} rooms, {len(edges)} files, {sum(map(len, edges.values()))} arrows")
    print(f"{len(against)} against the order, {len(circles(package))} circles, {len(oversized(package))} oversized")
    print(*against, *map(" -> ".join, circles(package)), *oversized(package), sep="\n")


if __name__ == "__main__":
    main()
