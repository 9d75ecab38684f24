"""Seconds, memory, recall and scores from 10^3 to 10^6 normal images and more, with what users would take instead.

spade-faiss bench scaling WORK --normal DIR --test DIR              # all cells; run again, it goes on where it was
spade-faiss bench scaling WORK --sizes 1000 10000 --parts retrieval
spade-faiss bench scaling --table                                   # tables and plots of what was measured

WORK is a folder for galleries: 16 kB an image at the largest size, as an index is written beside the last one. DIR are
normal images, and test images in folders, of which good/ are normal. Images beyond the real ones are SYNTHETIC
features, drawn from a mixture that is fitted to the real ones (synthetic.py). Each cell runs in a process of its own
and is a line in RESULTS/scaling.jsonl; cells that are there are passed over: delete a line to measure it again.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, available_bytes, machine
from scaling_work import Work
from tqdm import tqdm

PARTS = ("features", "pool", "build", "open", "stored", "add", "whole", "retrieval", "peers")
DIMENSION = 1280
GB = 10**9
NEEDED = ("matplotlib", "sklearn", "usearch")  # the extra `bench`


CHILDREN = {  # what runs in a process of its own: module and function, so that it imports no more than it needs
    "features": ("scaling_cells", "features"),
    "pool": ("scaling_live", "fill_pool"),
    "build": ("scaling_cells", "build"),
    "reindex": ("scaling_cells", "reindex"),
    "open": ("scaling_cells", "opening"),
    "stored": ("scaling_cells", "stored"),
    "add": ("scaling_live", "adding"),
    "reader": ("scaling_live", "reader"),
    "whole": ("scaling_live", "whole"),
    "retrieval": ("scaling_cells", "retrieval"),
    "peers": ("scaling_peers", "peer"),
}


class Cells:
    """The lines of the results, and the running of those that are missing."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Work(args.work)
        self.path = RESULTS / f"{args.name}.jsonl"
        self.lines = read_lines(self.path)
        self._machine = machine()
        self.failed = 0

    def planned(self) -> Iterator[tuple[str, str, dict[str, Any], int]]:
        """Yield (cell, part, values for its process, bytes of memory that it needs), in their order."""
        from scaling_cells import AT_MOST, EXACT, KINDS
        from scaling_peers import BANK_BYTES, BANK_IMAGES, PEERS

        args = self.args
        every: list[tuple[str, str, dict[str, Any], float]] = []
        if args.normal and args.test:
            values = {"normal": str(args.normal.resolve()), "test": str(args.test.resolve())}
            every.append(("features", "features", values, 1))
            every.append((f"pool {args.pool}", "pool", {"images": args.pool}, 1))
        best = max(args.recall)
        timing = {"singles": args.singles, "batch": args.batch}
        for n in sorted(args.sizes):
            flat = n * DIMENSION * 4 / GB
            auto = {"n": n, "recall": best, "memory": args.memory}
            every.append((f"build n={n}", "build", auto, 1 + min(flat, args.memory / GB) * 1.5))
            index = {"n": n, "index": ("auto", best)}
            loaded = min(flat, args.memory / GB)
            for cold in (True, False):
                every.append((f"open n={n} {'cold' if cold else 'warm'}", "open", {**index, "cold": cold}, 1 + loaded))
            every.append((f"stored n={n}", "stored", {"n": n}, 1 + n / 10**6))
            every.append((f"add n={n}", "add", index, 1 + 2 * loaded))
            every.append((f"whole n={n}", "whole", {**index, "images": args.images}, 2 + loaded))
            for kind in args.kinds or KINDS:
                for recall in args.recall if kind not in EXACT else [best]:
                    if n <= AT_MOST.get(kind, n):
                        cell = f"retrieval n={n} {kind}" + (f" recall={recall}" if kind not in EXACT else "")
                        needed = 1 + (loaded if kind == "auto" else 2.2 * flat)  # `auto` goes without the exact one
                        every.append((cell, "retrieval", {"n": n, "index": (kind, recall), **timing}, needed))
            for name in args.peers or PEERS:
                gb = 1 + flat * (2.5 if "HNSW" in name else 1.3)
                if "bank" not in name:
                    every.append((f"peer n={n} {name}", "peers", {"n": n, "name": name, **timing}, gb))
        for n in sorted({*args.sizes, *BANK_IMAGES}) if "PatchCore-style bank" in (args.peers or PEERS) else []:
            gb = 1 + (n * BANK_BYTES / GB * 1.3 if n in BANK_IMAGES else 0)
            name = "PatchCore-style bank"
            every.append((f"peer n={n} {name}", "peers", {"n": n, "name": name, **timing}, gb))
        for cell, part, values, gb in every:
            if part in args.parts:
                yield cell, part, values, int(gb * GB)

    def run(self) -> None:
        """Measure the missing cells."""
        todo = [one for one in self.planned() if one[0] not in self.lines or self._is_gone(*one)]
        bar = tqdm(todo, unit="cell", disable=None if self.args.quiet is None else self.args.quiet)
        for cell, part, values, needed in bar:
            bar.set_description(cell)
            values = dict(values)
            start = time.monotonic()
            built = None
            if needed > available_bytes():
                result = {"left_out": f"needs {needed / GB:.0f} GB of memory, {available_bytes() / GB:.0f} are free"}
            else:
                index = values.pop("index", None)
                built = self._index(values["n"], *index) if index else {}
                result = built if "left_out" in built else self._child(part, values)
            if part == "build" and "left_out" not in result:
                self._remember(values["n"], "auto", values["recall"], {"seconds": result["index_seconds"]})
            if part == "retrieval" and built and "left_out" not in result:
                result = {"build": built, **result}
            self._write(cell, part, values, result, time.monotonic() - start)

    def _is_gone(self, cell: str, part: str, values: dict[str, Any], needed: int) -> bool:
        """Tell whether a cell made a gallery that others need, and that is not there any more."""
        path = {"build": self.work.gallery(values.get("n", 0)), "pool": self.work.pool, "features": self.work.file}
        return part in path and "left_out" not in self.lines[cell]["result"] and not path[part].exists()

    def _index(self, n: int, kind: str, recall: float) -> dict[str, Any]:
        """Give the gallery of n images this index, unless it has it; returns what that took."""
        if not self.work.gallery(n).exists():
            return {"left_out": f"no gallery of {n} images: its building was left out"}
        path = self.work.folder / f"{n}.index.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if (found.get("kind"), found.get("recall")) == (kind, recall):
            return dict(found["built"])
        path.unlink(missing_ok=True)
        values = {"n": n, "kind": kind, "recall": recall, "memory": self.args.memory}
        built = self._child("reindex", values, self.args.build_limit)
        if "left_out" not in built:
            self._remember(n, kind, recall, built)
        return built

    def _remember(self, n: int, kind: str, recall: float, built: dict[str, Any]) -> None:
        text = json.dumps({"kind": kind, "recall": recall, "built": built})
        (self.work.folder / f"{n}.index.json").write_text(text)

    def _child(self, name: str, values: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        limit = limit or (self.args.limit if name == "peers" else self.args.build_limit)
        script = [sys.executable, __file__, "--child", name, json.dumps({"work": str(self.work.folder), **values})]
        try:
            done = subprocess.run(script, stdout=subprocess.PIPE, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"left_out": f"takes more than {limit:.0f} s"}
        if done.returncode == -9:
            return {"left_out": "killed, as for want of memory"}
        if done.returncode:
            return {"failed": f"exit status {done.returncode}: see above"}
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def _write(self, cell: str, part: str, values: dict[str, Any], result: dict[str, Any], seconds: float) -> None:
        if "failed" in result:
            self.failed += 1
            return
        images = self.work.images(values["n"]) if "n" in values else ""
        shown = {name: value for name, value in values.items() if name not in ("normal", "test")}  # paths of a machine
        line = {"cell": cell, "part": part, **shown, "images": images, "result": result}
        line |= {"cell_seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d"), "machine": self._machine}
        self.lines[cell] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of results by cell, the last of each."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {line["cell"]: line for line in lines}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", metavar="WORK")
    parser.add_argument("--normal", type=Path, metavar="DIR", help="real normal images")
    parser.add_argument("--test", type=Path, metavar="DIR", help="real test images, normal ones in good/")
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**3, 10**4, 10**5, 10**6], metavar="N")
    parser.add_argument("--kinds", nargs="+", help="of the index; default: all")
    parser.add_argument("--recall", nargs="+", type=float, default=[0.99], help="targets")
    parser.add_argument("--memory", type=int, default=4 * GB, help="bytes for `auto`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="+", help="default: all")
    parser.add_argument("--singles", type=int, default=200, help="queries, one at a time")
    parser.add_argument("--batch", type=int, default=256, help="queries at once")
    parser.add_argument("--images", type=int, default=100, help="test images of whole queries")
    parser.add_argument("--pool", type=int, default=3000, help="images whose patches are stored")
    parser.add_argument("--limit", type=float, default=600, help="seconds a peer's cell may take")
    parser.add_argument("--build-limit", type=float, default=7200, help="seconds any other cell may take")
    parser.add_argument("--name", default="scaling", help="of the files of results")
    parser.add_argument("--table", action="store_true", help="measure nothing: tables and plots of what there is")
    parser.add_argument("--quiet", action="store_const", const=True, help="no progress bar")
    args = parser.parse_args()
    if args.work is None and not args.table:
        parser.error("expected WORK, a folder for galleries, or --table")
    return args


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        (module, function), values = CHILDREN[sys.argv[2]], json.loads(sys.argv[3])
        print(json.dumps(getattr(importlib.import_module(module), function)(Work(values.pop("work")), **values)))
        return
    args = parsed()
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = 0
    if not args.table:
        args.work.mkdir(parents=True, exist_ok=True)
        need = sum(args.sizes) * 5500 + 2 * max(args.sizes) * 5200 + args.pool * 263_000
        free = shutil.disk_usage(args.work).free
        print(f"{args.work}: needs up to {need / GB:.1f} GB in all, {free / GB:.1f} GB are free", file=sys.stderr)
        cells = Cells(args)
        if "features" not in cells.lines and not (args.normal and args.test):
            sys.exit(f"scaling: expected --normal DIR and --test DIR, as {args.work} has no features yet")
        cells.run()
        failed = cells.failed
    from scaling_plots import plots, tables

    lines = list(read_lines(RESULTS / f"{args.name}.jsonl").values())
    print(tables(lines))
    for path in plots(lines, RESULTS, args.name):
        print(path, file=sys.stderr)
    if failed:
        sys.exit(f"scaling: {failed} cells failed; run again")


if __name__ == "__main__":
    main()
