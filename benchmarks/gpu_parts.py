"""The parts of benchmarks/gpu.py: each measures one stage, smaller sizes first, and gives up the rest in time."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import without_faiss
from PIL import Image

from spade_faiss.images.decode import decode
from spade_faiss.options import SearchOptions
from spade_faiss.patch_search.distinct import search_distinct
from spade_faiss.patch_search.gpu import tiles
from spade_faiss.patch_search.gpu.candidates import Search
from spade_faiss.patch_search.gpu.search import Wanted, search_together, search_torch
from spade_faiss.patch_search.pyramid.search import search_pyramid
from spade_faiss.patch_search.window.search import search_window

Shapes = tuple[tuple[int, int, int], ...]
SHAPES: dict[str, Shapes] = {
    "efficientnet_lite0": ((24, 56, 56), (40, 28, 28), (112, 14, 14)),
    "vit 768": ((768, 16, 16),),
    "wide_resnet50_2": ((256, 56, 56), (512, 28, 28), (1024, 14, 14)),
}
TINY_SHAPES: dict[str, Shapes] = {"two levels": ((8, 8, 8), (12, 4, 4)), "one level": ((16, 6, 6),)}
RANK = 24  # of made features: patches of images are alike, as real ones are
KAPPA, DISTINCT = 1, 8  # as the recipes spade and relative have them
TOGETHER = 8  # queries in one launch
OTHERS = 50  # neighbours, up to which windows, distinct matches and FAISS are measured too
COMPILING = 90  # seconds that must be left before what takes half of them to compile is begun
WARM = 3  # calls that are not timed: a search is recorded at the third


@dataclass
class Run:
    """One run: where, how large, how long, and what was left out.

    Attributes:
        device: of torch: "cuda:0", or "cpu" in a dry run.
        dry: every path at tiny sizes.
        until: time.monotonic() at which the part must end.
        left_out: what there was no time or no library for, with the reason.
    """

    device: str
    dry: bool
    until: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def has(self, seconds: float, what: str) -> bool:
        """Return whether so many seconds are left; if not, it is noted that this is left out."""
        if time.monotonic() + seconds <= self.until:
            return True
        self.left_out.append(f"{what}: the part's share of the time is used up")
        return False

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int = 7) -> float:
        """Median seconds of a call, once warm, the device's work included; fewer repeats of what is slow."""
        taken: list[float] = []
        for number in range(repeats + WARM):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - start)
            if number >= WARM and (sum(taken) > 2 or time.monotonic() > self.until):
                break
        return statistics.median(taken[WARM:])

    def once(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of one call, and its result: for what takes long on the CPU."""
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    @contextmanager
    def memory(self, target: dict[str, Any]) -> Iterator[None]:
        """Note the peak of the device's memory in this block, in MiB."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.is_gpu:
            target["peak_device_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)


def made_levels(shapes: Shapes, k: int, device: str) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """A query [(c, h, w), ...] on the host and its neighbours [(K, c, h, w), ...] on the device, float16.

    Of low rank with noise, and smooth: so nearest patches stand out, as those of images do.
    """
    maker = torch.Generator(device=device).manual_seed(0)
    query, neighbours = [], []
    for c, h, w in shapes:
        mixing = torch.randn(RANK, c, generator=maker, device=device)
        coarse = torch.randn(k + 1, RANK, max(2, h // 4), max(2, w // 4), generator=maker, device=device)
        smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear", align_corners=False)
        level = torch.empty(k + 1, c, h, w, dtype=torch.float16, device=device)
        for number in range(k + 1):
            clean = torch.einsum("rhw,rc->chw", smooth[number], mixing) / RANK**0.5
            level[number] = (clean + 0.2 * torch.randn(c, h, w, generator=maker, device=device)).abs().half()
        query.append(level[0].cpu().numpy())
        neighbours.append(level[1:])
    return query, neighbours


def made_images(count: int, size: int) -> list[np.ndarray]:
    """Smooth coloured noise, (size, size, 3) uint8."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 9, 9, 3), np.uint8)
    return [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in small]


def product_rate(run: Run) -> dict[str, Any]:
    """What the card multiplies at best: the measure of everything that multiplies."""
    n = 64 if run.dry else 8192
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        a, b = (torch.randn(n, n, device=run.device).to(dtype) for _ in range(2))
        found[f"{name}_tflops"] = round(2 * n**3 / run.seconds(lambda a=a, b=b: a @ b) / 1e12, 3)
    return found


def decoding(run: Run) -> dict[str, Any]:
    """JPEG files from memory, in one thread and in all."""
    buffer = io.BytesIO()
    Image.fromarray(made_images(1, 64 if run.dry else 512)[0]).save(buffer, "JPEG", quality=90)
    content, count = buffer.getvalue(), 4 if run.dry else 256
    found: dict[str, Any] = {}
    for threads in (1, torch.get_num_threads()):
        with ThreadPoolExecutor(threads) as pool:
            seconds = run.seconds(lambda pool=pool: list(pool.map(decode, [content] * count)), 3)
        found[f"{threads}_threads_images_per_s"] = round(count / seconds)
    return found


def networks(run: Run) -> dict[str, Any]:
    """Images a second of each network and precision, and the largest difference from float32 on the CPU."""
    import timm

    names = ["test_resnet"] if run.dry else ["tf_efficientnet_lite0", "vit_base_patch16_224", "wide_resnet50_2"]
    found: dict[str, Any] = {}
    for name in names:
        torch.manual_seed(0)
        plain = timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(False)
        images = torch.rand(*(2, 3, 64, 64) if run.dry else (64, 3, 224, 224))
        right = plain(images[:2])
        model, batch = plain.to(run.device), images.to(run.device)
        found[name] = cell = {}

        def measure(way: str, call: Callable[[torch.Tensor], torch.Tensor], cell: Any = cell, batch: Any = batch,
                    right: Any = right) -> None:  # fmt: skip
            with torch.inference_mode():
                off = (call(batch)[:2].float().cpu() - right).abs().max() / right.abs().max()
                seconds = run.seconds(lambda: call(batch), 5)
            cell[way] = {"images_per_s": round(len(batch) / seconds, 1), "largest_difference": float(off)}

        def narrow(views: torch.Tensor, call: Any = model) -> torch.Tensor:
            with torch.autocast(run.device.partition(":")[0], torch.bfloat16):
                result: torch.Tensor = call(views)
                return result

        measure("float32", model)
        measure("bfloat16", narrow)
        last = model.to(memory_format=torch.channels_last)
        measure("bfloat16 channels_last", lambda views, narrow=narrow: narrow(
            views.contiguous(memory_format=torch.channels_last)))  # fmt: skip
        if run.dry or run.has(45, f"network {name}: torch.compile"):
            try:
                compiled = torch.compile(last, backend="eager" if run.dry else "inductor")
                measure("bfloat16 compiled", lambda views, narrow=narrow, compiled=compiled: narrow(
                    views, compiled))  # fmt: skip
            except Exception as error:
                run.left_out.append(f"network {name}: torch.compile: {type(error).__name__}")
    return found


def retrieval(run: Run) -> dict[str, Any]:
    """Milliseconds a query of 50 neighbours among image features: by torch and, if it is installed, FAISS."""
    sizes, d, k = ((200,), 16, 5) if run.dry else ((10**4, 10**5, 10**6), 1280, 50)
    found: dict[str, Any] = {}
    for n in sizes:
        if not (run.dry or run.has(5 + 40 * n / 10**6, f"retrieval among {n}")):
            break
        maker = torch.Generator(device=run.device).manual_seed(0)
        gallery = torch.randn(n, d, generator=maker, device=run.device)
        query = gallery[:32] + 0.1 * torch.randn(32, d, generator=maker, device=run.device)
        norms = gallery.square().sum(1)
        found[str(n)] = cell = {}
        with run.memory(cell):
            for many in (1, 32):

                def nearest(many: int = many, gallery: Any = gallery, query: Any = query, norms: Any = norms) -> Any:
                    return torch.addmm(norms, query[:many], gallery.T, alpha=-2).topk(k, largest=False)

                cell[f"torch_{many}_ms"] = round(1000 * run.seconds(nearest), 4)
        host, asked = gallery.cpu().numpy(), query.cpu().numpy()
        right = nearest().indices.cpu().numpy()
        cpu, ids = run.once(lambda host=host, asked=asked: numpy_nearest(host, asked[:1], k))
        cell["cpu_numpy_1_ms"], cell["numpy_agrees"] = round(1000 * cpu, 3), float((ids[0] == right[0]).mean())
        if without_faiss.is_missing():
            continue
        cell.update(faiss_retrieval(run, host, asked, k, right))
    if without_faiss.is_missing():
        run.left_out.append(f"retrieval by FAISS flat and IVF: {without_faiss.WHY}")
    return found


def numpy_nearest(gallery: np.ndarray, query: np.ndarray, k: int) -> np.ndarray:
    """Exact ids (q, k) by one product on the CPU."""
    scores = np.einsum("nd,nd->n", gallery, gallery) - 2 * (query @ gallery.T)
    some = np.argpartition(scores, k, axis=1)[:, :k]
    return np.take_along_axis(some, np.take_along_axis(scores, some, 1).argsort(1), 1)


def faiss_retrieval(run: Run, gallery: np.ndarray, query: np.ndarray, k: int, right: np.ndarray) -> dict[str, Any]:
    """FAISS on the CPU and on a GPU that it sees: milliseconds of one query and of 32 together, recall."""
    import faiss

    found: dict[str, Any] = {}
    n, d = gallery.shape
    lists = max(1, min(4096, int(n**0.5)))
    gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
    if not gpus:
        run.left_out.append("retrieval by FAISS on a GPU: FAISS sees none")
    for kind in ("Flat", f"IVF{lists},Flat"):
        if kind != "Flat" and not (run.dry or run.has(3 + n / 20_000, f"retrieval: FAISS {kind} among {n}")):
            continue
        index = faiss.index_factory(d, kind)
        index.train(gallery[: max(64 * lists, 1)])
        index.add(gallery)
        if kind != "Flat":
            index.nprobe = 16
        places = {"cpu": index}
        if gpus:
            places["gpu"] = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        for place, there in places.items():
            name = f"faiss_{kind.partition(',')[0].lower()}_{place}"
            for many in (1, 32):
                found[f"{name}_{many}_ms"] = round(
                    1000 * run.seconds(lambda there=there, many=many: there.search(query[:many], k)), 4
                )  # fmt: skip
            ids = there.search(query, k)[1]
            hits = [len(set(a) & set(b)) / k for a, b in zip(ids.tolist(), right.tolist(), strict=False)]
            found[f"{name}_recall"] = round(float(np.mean(hits)), 4)
    return found


def patch_search(run: Run) -> list[dict[str, Any]]:
    """Each engine at each size: milliseconds, share of the card's product rate, difference from the CPU's."""
    rates, cells = product_rate(run), []
    for k in (2, 3) if run.dry else (5, 50, 150):
        for name, shapes in (TINY_SHAPES if run.dry else SHAPES).items():
            if run.dry or run.has(12 if k <= OTHERS else 6, f"patch search {name}, K = {k}"):
                cells.append({"shapes": name, "k": k, **search_cell(run, shapes, k, rates)})
                if run.is_gpu:
                    torch.cuda.empty_cache()
    return cells


def search_cell(run: Run, shapes: Shapes, k: int, rates: dict[str, Any]) -> dict[str, Any]:
    """One size; see patch_search."""
    query, neighbours = made_levels(shapes, k, run.device)
    host = [level.cpu().numpy() for level in neighbours]
    patches, channels = shapes[0][1] * shapes[0][2], sum(shape[0] for shape in shapes)
    cell: dict[str, Any] = {"patches": patches, "channels": channels, "values": sum(level[0].size for level in host)}
    with run.memory(cell):
        seconds = run.seconds(lambda: concatenated(query, neighbours, run))
    operations = 2 * patches * patches * k * channels
    cell["torch_ms"] = round(1000 * seconds, 4)
    cell["tflops"] = round(operations / seconds / 1e12, 3)
    cell["of_product_rate"] = round(cell["tflops"] / max(rates["bfloat16_tflops"], 1e-9), 3)
    product = run.seconds(product_of(query, neighbours, run))
    cell["product_ms"], cell["product_of_rate"] = round(1000 * product, 4), round(
        operations / product / 1e12 / max(rates["bfloat16_tflops"], 1e-9), 3
    )  # fmt: skip
    cell["upload_and_search_ms"] = round(1000 * run.seconds(
        lambda: concatenated(query, host, run), 3), 4)  # fmt: skip
    many = 2 if run.dry else TOGETHER
    if patches * k < 10**5 or run.dry:
        galleries = [level[None].expand(many, *level.shape) for level in neighbours]
        together = run.seconds(lambda: search_together([query] * many, galleries, KAPPA, run.device))
        cell[f"torch_{many}_together_ms_each"] = round(1000 * together / many, 4)
    found = concatenated(query, neighbours, run)
    kappa = min(DISTINCT, k)
    compiled(query, host)
    cpu, right = run.once(lambda: search_pyramid(query, host, KAPPA))
    cell["cpu_pyramid_ms"], cell["largest_difference"] = round(1000 * cpu, 2), difference(found, right)
    radius = (2, 2)
    if k > OTHERS:
        return cell
    cell["window_torch_ms"] = round(1000 * run.seconds(
        lambda: concatenated(query, neighbours, run, radius), 3), 4)  # fmt: skip
    found = concatenated(query, neighbours, run, radius)
    cpu, right = run.once(lambda: search_window(query, host, KAPPA, radius, False))
    cell["window_cpu_ms"], cell["window_largest_difference"] = round(1000 * cpu, 2), difference(found, right)
    cell["distinct_torch_ms"] = round(1000 * run.seconds(lambda: nearest_of_each(query, neighbours, kappa, run), 3), 4)
    if run.dry or run.has(COMPILING, f"distinct matches on the CPU, {patches} x {channels}, K = {k}"):
        own = [level.reshape(len(level), -1) for level in query]
        for others in (slice(kappa), slice(None)):  # what is compiled first is not timed
            cpu, right = run.once(lambda some=others: [
                search_distinct(a, b[some], kappa) for a, b in zip(own, host, strict=True)])  # fmt: skip
        cell["distinct_cpu_ms"] = round(1000 * cpu, 2)
        found = nearest_of_each(query, neighbours, kappa, run)
        cell["distinct_largest_difference"] = max(difference(a, b) for a, b in zip(found, right, strict=True))
    cell.update(flat_cell(run, query, host))
    return cell


def compiled(query: list[np.ndarray], host: list[np.ndarray]) -> None:
    """Run the CPU's engines once, among few neighbours: what is compiled then is not timed."""
    few = [level[:2] for level in host]
    search_pyramid(query, few, KAPPA)
    search_window(query, few, KAPPA, (2, 2), False)


def product_of(query: list[np.ndarray], neighbours: list[torch.Tensor], run: Run) -> Callable[[], Any]:
    """Return what multiplies all patches, and keeps the least of each group: the part that a product rate measures."""
    own = [torch.from_numpy(level[None, None]).to(run.device) for level in query]
    search = Search.of(own, [level[None] for level in neighbours], KAPPA, False)
    theirs = search.upsampler.operand(search.levels)
    limits = theirs.halves - theirs.doubts
    return lambda: tiles.least(search.operand.values, theirs.values, limits)


def concatenated(query: list[np.ndarray], neighbours: list[Any], run: Run, radius: Any = None) -> Any:
    """Search all levels together, by torch; with a radius near each patch's position only."""
    return search_torch([query], [level[None] for level in neighbours], run.device, Wanted(KAPPA, radius=radius))[0]


def nearest_of_each(query: list[np.ndarray], neighbours: list[torch.Tensor], kappa: int, run: Run) -> list[Any]:
    """Search each level by itself for distinct matches, by torch."""
    return [
        search_together([[own]], [others[None]], kappa, run.device, distinct=True)[0]
        for own, others in zip(query, neighbours, strict=True)
    ]


def flat_cell(run: Run, query: list[np.ndarray], host: list[np.ndarray]) -> dict[str, Any]:
    """The engine flat on the CPU, and on a GPU that FAISS sees."""
    if without_faiss.is_missing():
        text = f"patch search by a flat FAISS index: {without_faiss.WHY}"
        if text not in run.left_out:
            run.left_out.append(text)
        return {}
    import faiss

    from spade_faiss.patch_search.flat import search_flat

    places = ["cpu"] + (["cuda:0"] if getattr(faiss, "get_num_gpus", lambda: 0)() else [])
    found = {}
    for place in places:
        seconds, _ = run.once(lambda place=place: search_flat(query, host, KAPPA, place, SearchOptions.block_bytes))
        found[f"flat_{place.partition(':')[0]}_ms"] = round(1000 * seconds, 2)
    return found


def difference(found: Any, right: Any) -> float:
    """The largest difference of squared distances, as a share of the largest."""
    return float(np.abs(found[0] - right[0]).max() / max(float(right[0].max()), 1e-30))


def ways() -> dict[str, str]:
    """What multiplied fastest, by the kind of work."""
    return tiles.chosen()
