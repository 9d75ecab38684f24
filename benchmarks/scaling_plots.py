"""Tables and log-log plots of the scaling benchmark's lines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # the extra `bench`

Lines = list[dict[str, Any]]
Curves = dict[str, list[tuple[float, float]]]  # (N, value) by name

MIB = 2**20
STAGES = {  # of a query, as Detection.seconds has them
    "decode": "decode",
    "extract": "network",
    "retrieve": "nearest images",
    "read": "read patches (disk)",
    "match": "search patches",
    "score": "score",
    "other": "other",
}
TITLE = "Retrieval of the K = 50 nearest normal images (of the bank: the nearest patches)"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f00")
PEERS = {  # marker and grey of each peer's line, and what it is in a legend
    "torch cdist": ("s", "0.1", "torch cdist"),
    "scikit-learn brute": ("^", "0.4", "scikit-learn, brute force"),
    "usearch HNSW": ("D", "0.6", "usearch HNSW"),
    "PatchCore-style bank": ("X", "#8b0000", "bank of all patches\n(PatchCore-style)"),
}


def plots(lines: Lines, folder: Path, name: str) -> Iterator[Path]:
    """Draw what there are lines for; yields the files."""
    real = _real(lines)
    own, peers = _retrieval(lines), list(_of(lines, "peers"))
    best = max((line["result"]["index"]["recall"] for line in own), default=0)
    own = [line for line in own if line["result"]["index"]["recall"] == best]  # the tables have the others
    seconds = _curves((_name(line), line, _get(line, "p50_ms", 1e-3)) for line in own)
    peer_seconds = _curves((_peer(line), line, _get(line, "p50_ms", 1e-3)) for line in peers)
    if seconds or peer_seconds:
        figure, axes = _axes(
            "seconds a query, one at a time (median)",
            "Retrieval of the K = 50 nearest normal images (the bank: nearest patches)",
        )
        _draw(axes, seconds, peer_seconds)
        yield _save(figure, axes, folder / f"{name}_query.png", real)
    # Its file's size, as much of which is in memory: what a process grows by depends on what it had free.
    memory = _curves((_name(line), line, _get(line, "index_file_bytes", 1e-9)) for line in own)
    peer_memory = _curves((_peer(line), line, _get(line, "resident_mib", MIB / 1e9)) for line in peers)
    if memory or peer_memory:
        figure, axes = _axes("GB", "Size of what is searched in memory")
        _draw(axes, memory, peer_memory)
        yield _save(figure, axes, folder / f"{name}_memory.png", real)
    whole = list(_of(lines, "whole"))
    stages = _curves(
        (label, line, line["result"]["seconds_median"].get(stage))
        for stage, label in STAGES.items()
        for line in whole
        if "seconds_median" in line["result"]
    )
    if stages:
        figure, axes = _axes("seconds (median)", "A whole query, default network and K = 50, by stages")
        total = _curves(("", line, _get(line, "total_median", 1)) for line in whole)[""]
        axes.plot(*zip(*sorted(total), strict=True), "-o", lw=4, c="0.1", label="whole query")
        _draw(axes, stages, {}, thinner=0)
        yield _save(figure, axes, folder / f"{name}_whole.png", real)


def _axes(y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="normal images N", ylabel=y)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw(axes: Axes, own: Curves, peers: Curves, thinner: float = 0.6) -> None:
    for number, (label, points) in enumerate(own.items()):
        style = {
            "c": COLOURS[number % len(COLOURS)],
            "lw": max(1.4, 4 - thinner * number) if thinner else 1.8,
        }  # those below are seen
        axes.plot(*zip(*sorted(points), strict=True), "-o", ms=5, label=label, **style)
    for name, points in peers.items():
        marker, colour, label = PEERS[name]
        axes.plot(*zip(*sorted(points), strict=True), "--", marker=marker, ms=5, lw=1.4, c=colour, label=label)


def _save(figure: Figure, axes: Axes, path: Path, real: int) -> Path:
    low, high = axes.get_xlim()
    if real and high > real:
        axes.axvspan(max(low, real), high, color="0.93", zorder=0)
        axes.text(
            0.99, 0.01, f"N > {real}, shaded: synthetic features, fitted to the real ones", fontsize=8, color="0.35",
            transform=axes.transAxes, ha="right", va="bottom",
        )  # fmt: skip
        axes.set_xlim(low, high)
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom / 1.8, top)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def tables(lines: Lines) -> str:
    """Return everything as Markdown."""
    parts = [_likeness(lines), _retrieval_table(lines), _peer_table(lines), _whole_table(lines)]
    parts += [_build_table(lines), _open_table(lines), _stored_table(lines), _add_table(lines)]
    return "\n\n".join(part for part in parts if part)


def _likeness(lines: Lines) -> str:
    found = [line["result"] for line in _of(lines, "features")]
    if not found:
        return ""
    both, result = found[-1]["likeness"], found[-1]
    title = (
        f"Synthetic features, drawn from a mixture of {result['clusters']} Gaussians of rank {result['rank']}, beside "
        f"as many real ones ({result['normal']}):"
    )
    rows = [[name.replace("_", " "), value, both["synthetic"][name]] for name, value in both["real"].items()]
    return f"{title}\n\n" + _table(["", "real", "synthetic"], rows)


def _retrieval_table(lines: Lines) -> str:
    rows = []
    for line in sorted(_retrieval(lines), key=lambda line: line["n"]):
        r = line["result"]
        rows.append(
            [_n(line), _name(line), r["build"]["seconds"], _gb(r["index_resident_mib"] * MIB),
             _gb(r["index_file_bytes"]), f"{r['p50_ms']:.3g} / {r['p99_ms']:.3g}", f"{r['batch_ms_a_query']:.3g}",
             f"{r['speedup_single']:.3g} / {r['speedup_batch']:.3g}" if r["speedup_single"] else "-",
             f"{r['recall']:.4f}",
             f"{r['score_change_median']:.2%}", f"{r['auroc_exact']} -> {r['auroc']}"]
        )  # fmt: skip
    left = [f"{_n(line)} {line['cell'].split(' ', 2)[2]}: {line['result']['left_out']}"
            for line in _of(lines, "retrieval") if "left_out" in line["result"]]  # fmt: skip
    head = ["N", "index", "build s", "GB in memory", "GB on disk", "p50 / p99 ms", "batched ms a query",
            "x faster than exact, single / batched", "recall@K", "score change, median",
            "AUROC, exact -> index"]  # fmt: skip
    return _titled("Retrieval of the 50 nearest, against an exact flat index in the same run:", head, rows, left)


def _peer_table(lines: Lines) -> str:
    rows, left = [], []
    for line in sorted(_of(lines, "peers"), key=lambda line: line["n"]):
        r = line["result"]
        if "left_out" in r:
            left.append(f"{_n(line)} {line['name']}: {r['left_out']}")
            continue
        rows.append(
            [_n(line), line["name"], r.get("build_seconds", "-"), _gb(r["resident_mib"] * MIB),
             f"{r['p50_ms']:.3g}" if "p50_ms" in r else "by formula",
             f"{r['batch_ms_a_query']:.3g}" if "batch_ms_a_query" in r else "-",
             r.get("recall", "-")]
        )  # fmt: skip
    head = ["N", "instead", "build s", "GB in memory", "p50 ms", "batched ms a query", "recall@K"]
    return _titled("What one would take instead:", head, rows, left)


def _whole_table(lines: Lines) -> str:
    rows = [
        [_n(line), *(f"{line['result']['seconds_median'].get(stage, 0):.4f}" for stage in STAGES),
         f"{line['result']['total_median']:.3f}", line["result"]["read_from_disk_a_query"]]
        for line in sorted(_of(lines, "whole"), key=lambda line: line["n"]) if "total_median" in line["result"]
    ]  # fmt: skip
    title = (
        "A whole query of a real test image by stages, median seconds. Patches of full size are read from a pool of "
        "real images' on disk that lends them to the gallery's images; its pages are dropped before each query:"
    )
    return _titled(title, ["N", *STAGES.values(), "whole", "images' patches read from disk"], rows)


def _build_table(lines: Lines) -> str:
    rows = [
        [_n(line), r["append_seconds"], r["index_seconds"], r["peak_mib_above_start"], r["features_mib"],
         _gb(r["disk_bytes"])]
        for line in sorted(_of(lines, "build"), key=lambda line: line["n"])
        if "seconds" in (r := line["result"])
    ]  # fmt: skip
    head = ["N", "append s", "index s", "peak MiB above start", "features MiB", "GB on disk"]
    return _titled("Building from ready features, index `auto`:", head, rows)


def _open_table(lines: Lines) -> str:
    rows = [
        [_n(line), r["files"], r["open_seconds"], r["first_search_seconds"], r["resident_mib_above_start_opened"],
         r["resident_mib_above_start_searched"], r["peak_mib"]]
        for line in sorted(_of(lines, "open"), key=lambda line: line["n"])
        if "open_seconds" in (r := line["result"])
    ]  # fmt: skip
    head = ["N", "files", "open s", "first search s", "MiB opened", "MiB searched", "peak MiB of the process"]
    return _titled("Opening in a fresh process:", head, rows)


def _stored_table(lines: Lines) -> str:
    rows = [
        [_n(line), r["shards"], r["first_ms"], r["p50_ms_of_the_last_100"], r["grown_mib"]]
        for line in sorted(_of(lines, "stored"), key=lambda line: line["n"])
        if "shards" in (r := line["result"])
    ]
    head = ["N", "shards", "first ms", "median ms of the last 100 of 300", "MiB grown"]
    return _titled(
        "Keys and levels (a few values each) of 50 images from as many shards as there would be:", head, rows
    )


def _add_table(lines: Lines) -> str:
    rows = []
    for line in sorted(_of(lines, "add"), key=lambda line: line["n"]):
        if "reader" not in (r := line["result"]):
            continue
        other = r["reader"]
        medians = " / ".join(str(other[span].get("p50_ms", "-")) for span in ("before", "meanwhile", "after"))
        rows.append(
            [_n(line), r["added"], r["add_seconds"], other["meanwhile"]["queries"], other["failed"],
             other["mixed_generations"], medians, other["longest_ms"], other["new_generation_ready_after_seconds"]]
        )  # fmt: skip
    head = ["N", "added", "s", "queries meanwhile", "failed", "of mixed generations",
            "p50 ms before / meanwhile / after", "longest ms", "s until the reader has the new one"]  # fmt: skip
    return _titled("Adding while another process queries:", head, rows)


def _titled(title: str, head: list[str], rows: list[list[Any]], left: list[str] | None = None) -> str:
    note = f"\n\nLeft out: {'; '.join(left)}." if left else ""
    return f"{title}\n\n{_table(head, rows)}{note}" if rows else note.strip()


def _table(head: list[str], rows: list[list[Any]]) -> str:
    ruler = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ruler, *rows])


def _of(lines: Lines, part: str) -> Iterator[dict[str, Any]]:
    return (line for line in lines if line["part"] == part)


def _retrieval(lines: Lines) -> Lines:
    return [line for line in _of(lines, "retrieval") if "p50_ms" in line["result"]]


def _curves(points: Iterable[tuple[str, dict[str, Any], float | None]]) -> Curves:
    curves: Curves = defaultdict(list)
    for name, line, value in points:
        if value is not None and value > 0:
            curves[name].append((line["n"], value))
    return dict(curves)


def _get(line: dict[str, Any], name: str, unit: float) -> float | None:
    value = line["result"].get(name)
    return None if value is None else value * unit


def _name(line: dict[str, Any]) -> str:
    """The kind, and the recall that it was tuned for."""
    return " ".join(line["cell"].split(" ")[2:]).replace("recall=", "recall ")


def _peer(line: dict[str, Any]) -> str:
    return str(line["name"])


def _n(line: dict[str, Any]) -> str:
    return f"{line['n']:,}".replace(",", " ") + (" (synthetic)" if "synthetic" in line["images"] else "")


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.3g}"


def _real(lines: Lines) -> int:
    return max((line["result"]["normal"] for line in _of(lines, "features")), default=0)
