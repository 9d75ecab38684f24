"""Draw the sample set in ``data/samples``: a woven twill, forty flawless pieces and twelve to test.

Every piece is rendered from its own seed, so the set is the same on each run and one piece can be redrawn without
the others. Needs numpy and pillow only::

    python data/make_samples.py --output data/samples
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]
Cells = NDArray[np.int64]

SIZE = 256
"""Side of an image, in pixels."""

OVERSAMPLING = 2
"""Samples per pixel and axis: the yarns' edges are sharp, and would otherwise alias."""

PITCH = 8.0
"""Distance from one yarn to the next, in pixels."""

MAX_TILT = 2.0
"""Degrees by which a piece may lie askew."""

THREAD_RADIUS = 1.25
"""Half the width of a loose thread's opaque core, in pixels."""

VIGNETTE = 0.24
"""Loss of light at the middle of a side; twice that in a corner."""

N_TRAIN = 40
N_TEST = 3
DEFECTS = ("loose_thread", "misweave", "smudge")
SEED = 20
JPEG_QUALITY = 90

WARP_COLOUR = np.array([62.0, 92.0, 128.0])
WEFT_COLOUR = np.array([206.0, 194.0, 172.0])
THREAD_COLOUR = np.array([172.0, 160.0, 138.0])


@dataclass(frozen=True)
class Patch:
    """An ellipse, in pixels from the image's centre."""

    centre: tuple[float, float]
    radii: tuple[float, float]
    angle: float

    def field(self, x: Array, y: Array) -> Array:
        """1 at the centre, 0 on the rim, negative outside."""
        dx, dy = x - self.centre[0], y - self.centre[1]
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        rim: Array = np.hypot((cos * dx + sin * dy) / self.radii[0], (cos * dy - sin * dx) / self.radii[1])
        return 1.0 - rim


def smoothstep(x: Array) -> Array:
    """Cubic step from 0 to 1."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur along the first two axes, the borders mirrored."""
    radius = int(np.ceil(3.0 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * image.ndim
        pad[axis] = (radius, radius)
        padded = np.pad(image, pad, mode="reflect")
        shifted = (np.take(padded, range(k, k + image.shape[axis]), axis=axis) for k in range(taps.size))
        image = np.sum([tap * part for tap, part in zip(taps, shifted, strict=True)], axis=0)
    return image


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """Noise with standard deviation near 1 that varies smoothly over ``size / cells`` pixels."""
    knots = rng.standard_normal((cells + 3, cells + 3))
    at = np.linspace(0.0, cells, size)
    low = np.floor(at).astype(int)
    step = smoothstep(at - low)
    rows = knots[low] * (1.0 - step)[:, None] + knots[low + 1] * step[:, None]
    out: Array = rows[:, low] * (1.0 - step) + rows[:, low + 1] * step
    return out * 1.3


def along_yarn(rng: np.random.Generator, index: Cells, along: Array, knots_per_pitch: float) -> Array:
    """Noise that is drawn for each yarn on its own and varies smoothly along it."""
    low = int(np.floor(along.min() * knots_per_pitch)) - 1
    high = int(np.ceil(along.max() * knots_per_pitch)) + 2
    table = rng.standard_normal((int(np.ptp(index)) + 1, high - low + 1))
    at = along * knots_per_pitch - low
    cell = np.floor(at).astype(np.int64)
    step = smoothstep(at - cell)
    row = index - index.min()
    out: Array = table[row, cell] * (1.0 - step) + table[row, cell + 1] * step
    return out


def twill(warp: Cells, weft: Cells, mirrored: NDArray[np.bool_]) -> Array:
    """1 where the warp yarn lies on top of the weft yarn and -1 where below: a 2/2 twill, or its mirror image."""
    diagonal = np.where(mirrored, warp - weft, warp + weft)
    return np.where(diagonal % 4 < 2, 1.0, -1.0)


def weave(rng: np.random.Generator, misweave: Patch | None) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Weave the cloth at the fine resolution: colours, height of the surface in pixels, where the twill is mirrored."""
    n = SIZE * OVERSAMPLING
    grid = (np.arange(n) + 0.5) / OVERSAMPLING - SIZE / 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    # Cloth is never laid down twice in the same way, nor pulled quite straight.
    angle = np.deg2rad(rng.uniform(-MAX_TILT, MAX_TILT))
    cos, sin = np.cos(angle), np.sin(angle)
    pitch = PITCH * rng.uniform(0.98, 1.02)
    x = x + 1.4 * smooth_noise(rng, n, 3)
    y = y + 1.4 * smooth_noise(rng, n, 3)
    shift = rng.uniform(0.0, 4.0, size=2)
    u = (cos * x - sin * y) / pitch + shift[0]
    v = (sin * x + cos * y) / pitch + shift[1]
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    u = u + 0.04 * along_yarn(rng, i, v, 0.4)
    v = v + 0.04 * along_yarn(rng, j, u, 0.4)
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)

    def mirrored(warp: Cells, weft: Cells) -> NDArray[np.bool_]:
        # The loom errs by whole crossings: a yarn is lifted or it is not.
        if misweave is None:
            return np.zeros(warp.shape, dtype=bool)
        across, down = (warp + 0.5 - shift[0]) * pitch, (weft + 0.5 - shift[1]) * pitch
        return misweave.field(cos * across + sin * down, cos * down - sin * across) > 0.0

    def lift(before: tuple[Cells, Cells], after: tuple[Cells, Cells], step: Array) -> Array:
        return twill(*before, mirrored(*before)) * (1.0 - step) + twill(*after, mirrored(*after)) * step

    def section(across: Array, width: Array) -> Array:
        return np.sqrt(np.clip(1.0 - (across / width) ** 2, 0.0, 1.0))

    # A yarn rises and falls between the middles of its crossings.
    row, column = np.floor(v - 0.5).astype(np.int64), np.floor(u - 0.5).astype(np.int64)
    warp_lift = lift((i, row), (i, row + 1), smoothstep(v - 0.5 - row))
    weft_lift = -lift((column, j), (column + 1, j), smoothstep(u - 0.5 - column))
    across_warp, across_weft = u - i - 0.5, v - j - 0.5
    width_warp = 0.50 + 0.03 * along_yarn(rng, i, v, 0.5)
    width_weft = 0.53 + 0.03 * along_yarn(rng, j, u, 0.5)
    warp_height = 0.55 * section(across_warp, width_warp) + 0.34 * warp_lift
    weft_height = 0.55 * section(across_weft, width_weft) + 0.34 * weft_lift
    height = np.maximum(warp_height, weft_height)

    # Each yarn has a shade of its own, slubs along it and the twist of its fibres.
    shade_warp = 1.0 + 0.06 * along_yarn(rng, i, v, 0.3) + 0.05 * along_yarn(rng, i, v, 3.0)
    shade_weft = 1.0 + 0.04 * along_yarn(rng, j, u, 0.3) + 0.04 * along_yarn(rng, j, u, 3.0)
    shade_warp += 0.07 * np.sin(2 * np.pi * (2.0 * v + 1.5 * across_warp + 0.15 * along_yarn(rng, i, v, 1.0)))
    shade_weft += 0.06 * np.sin(2 * np.pi * (2.0 * u + 1.5 * across_weft + 0.15 * along_yarn(rng, j, u, 1.0)))
    warp, weft = WARP_COLOUR * shade_warp[..., None], WEFT_COLOUR * shade_weft[..., None]
    colour = np.where((warp_height > weft_height)[..., None], warp, weft)
    return colour, height * pitch, mirrored(i, j)


def light(colour: Array, height: Array) -> Array:
    """Light the cloth from the upper left, darker in the hollows between the yarns."""
    slope_y, slope_x = np.gradient(height * OVERSAMPLING)
    facing = (1.0 + 0.30 * slope_x + 0.36 * slope_y) / np.sqrt(1.0 + slope_x**2 + slope_y**2)
    hollow = smoothstep((height / PITCH + 0.05) / 0.85)
    brightness: Array = (0.50 + 0.55 * np.clip(facing, 0.0, 1.5)) * (0.52 + 0.48 * hollow)
    return colour * brightness[..., None]


def shrink(image: Array) -> Array:
    """Average the fine samples of each pixel."""
    shape = (SIZE, OVERSAMPLING, SIZE, OVERSAMPLING, *image.shape[2:])
    out: Array = image.reshape(shape).mean(axis=(1, 3))
    return out


def draw_patch(rng: np.random.Generator, low: float, high: float) -> Patch:
    """Place a patch with radii between the two, clear of the image's border."""
    reach = SIZE / 2 - high - 14.0
    x, y = rng.uniform(-reach, reach, size=2)
    long, short = rng.uniform(low, high, size=2)
    return Patch((float(x), float(y)), (float(long), float(short)), float(rng.uniform(0.0, np.pi)))


def smudge(rng: np.random.Generator, image: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Rub a patch: the weave loses its relief and felts, the mean brightness stays."""
    patch = draw_patch(rng, 18.0, 27.0)
    y, x = np.mgrid[0:SIZE, 0:SIZE] - SIZE / 2 + 0.5
    weight = smoothstep(patch.field(x, y) * 2.2 + 0.35 + 0.12 * smooth_noise(rng, SIZE, 20))
    felt = image + 0.75 * (blur(image, 4.5) - image) + 7.0 * blur(rng.standard_normal((SIZE, SIZE, 1)), 0.7)
    return image + weight[..., None] * (felt - image), weight > 0.25


def loose_thread(rng: np.random.Generator, image: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Drop a thin stray fibre on the weave, in a colour between the yarns' own."""
    centre = rng.uniform(80.0, SIZE - 80.0, size=2)
    angle = rng.uniform(0.0, np.pi)
    axis = np.array([np.cos(angle), np.sin(angle)])
    normal = np.array([-axis[1], axis[0]])
    reach, bend = rng.uniform(42.0, 58.0), rng.uniform(14.0, 28.0) * rng.choice([-1.0, 1.0])
    ends = centre - reach * axis, centre + reach * axis
    pulls = centre - 0.3 * reach * axis + bend * normal, centre + 0.4 * reach * axis - bend * normal
    t = np.linspace(0.0, 1.0, 121)[:, None]
    curve = (1 - t) ** 3 * ends[0] + 3 * (1 - t) ** 2 * t * pulls[0] + 3 * (1 - t) * t**2 * pulls[1] + t**3 * ends[1]
    tangent = np.gradient(curve, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)

    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    squared = np.stack([(x - px) ** 2 + (y - py) ** 2 for px, py in curve])
    nearest = squared.argmin(axis=0)
    distance = np.sqrt(squared.min(axis=0))
    away_x, away_y = x - curve[nearest, 0], y - curve[nearest, 1]
    side = np.sign(away_y * tangent[nearest, 0] - away_x * tangent[nearest, 1]) * distance
    # The lamp stands at the upper left, so the shadow falls on the lower right.
    lower_right = np.where(tangent[nearest, 0] - tangent[nearest, 1] > 0.0, side, -side)
    shadow = np.exp(-0.5 * ((lower_right - THREAD_RADIUS - 1.4) / 1.3) ** 2)
    image = image * (1.0 - 0.36 * shadow[..., None])
    fibre = THREAD_COLOUR * (1.0 - 0.08 * np.clip(lower_right, -2.0, 2.0)[..., None])
    weight = 0.9 * (1.0 - smoothstep((distance - THREAD_RADIUS) / 1.2))
    return image + weight[..., None] * (fibre - image), distance <= 3.0


def photograph(rng: np.random.Generator, image: Array) -> NDArray[np.uint8]:
    """Add what changes from shot to shot: the lamp, the camera's gain and white balance, and its grain."""
    slope = rng.uniform(-0.10, 0.10, size=2)
    side = np.linspace(-1.0, 1.0, SIZE)
    lamp = 1.0 + slope[0] * side[None, :] + slope[1] * side[:, None] + 0.02 * smooth_noise(rng, SIZE, 2)
    lamp *= 1.05 - VIGNETTE * (side[None, :] ** 4 + side[:, None] ** 4)
    gain = rng.uniform(0.92, 1.08) * rng.uniform(0.985, 1.015, size=3)
    image = image * lamp[..., None] * gain
    grain = rng.uniform(1.5, 4.0)
    image += grain * (rng.standard_normal((SIZE, SIZE, 1)) + 0.4 * rng.standard_normal((SIZE, SIZE, 3)))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def render(seed: tuple[int, ...], defect: str = "good") -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one piece of cloth and its mask, 255 where it is defective."""
    rng = np.random.default_rng(seed)
    patch = draw_patch(rng, 20.0, 28.0) if defect == "misweave" else None
    colour, height, mirrored = weave(rng, patch)
    image = shrink(light(colour, height))
    mask = shrink(mirrored.astype(np.float64)) >= 0.5
    if defect == "smudge":
        image, mask = smudge(rng, image)
    elif defect == "loose_thread":
        image, mask = loose_thread(rng, image)
    return photograph(rng, image), mask.astype(np.uint8) * 255


def save(pixels: NDArray[np.uint8], path: Path) -> None:
    """Write an image: a photograph as JPEG, a mask as PNG, which keeps it exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path, optimize=True)
    else:
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY, optimize=True, subsampling="4:2:0")


def write_samples(output: Path) -> list[Path]:
    """Write the whole set below ``output`` and return the files' paths."""
    pieces = [("train/good", (SEED, 0, number)) for number in range(N_TRAIN)]
    for kind, defect in enumerate(("good", *DEFECTS), start=1):
        pieces += [(f"test/{defect}", (SEED, kind, number)) for number in range(N_TEST)]
    written: list[Path] = []
    for folder, seed in pieces:
        defect, number = Path(folder).name, seed[-1]
        image, mask = render(seed, defect)
        written.append(output / folder / f"{number:03d}.jpg")
        save(image, written[-1])
        if defect != "good":
            written.append(output / "ground_truth" / defect / f"{number:03d}_mask.png")
            save(mask, written[-1])
    return written


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Draw the sample set.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "samples")
    written = write_samples(parser.parse_args().output)
    print(f"{len(written)} files, {sum(path.stat().st_size for path in written) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
