"""What an extractor sees of an image: resized, cropped, and where its cells lie in the image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spade_faiss.images.view import View


@pytest.mark.parametrize("image_size", [(300, 200), (33, 57), (256, 256), (8, 999)])
@pytest.mark.parametrize("view", [View((256, 256), (224, 224)), View((64, 96), (33, 95)), View((50, 40), (50, 40))])
def test_view_is_pillows_resize_and_crop(view: View, image_size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*image_size, 3), dtype=np.uint8)
    (top, left), (height, width) = view.offset, view.crop
    whole = Image.fromarray(pixels).resize((view.resized[1], view.resized[0]), Image.Resampling.BILINEAR)
    seen = view.apply(pixels)
    assert np.array_equal(seen, np.asarray(whole.crop((left, top, left + width, top + height))))
    assert seen.flags.c_contiguous


def test_view_centres_its_crop() -> None:
    assert View((256, 256), (224, 224)).offset == (16, 16)
    assert View((100, 61), (90, 40)).offset == (5, 10)  # an odd margin has the larger half below and to the right
    marked = np.zeros((100, 61, 3), np.uint8)
    marked[5, 10] = 255
    assert View((100, 61), (90, 40)).apply(marked)[0, 0, 0] == 255


def test_view_averages_what_it_shrinks() -> None:
    checkered = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)  # sampling would give all black or all white
    seen = View((8, 8), (8, 8)).apply(np.repeat(checkered[..., None], 3, axis=2).astype(np.uint8))
    assert np.abs(seen[1:-1, 1:-1].astype(int) - 127).max() <= 4


@pytest.mark.parametrize("image_size", [(1, 1), (8, 9), (224, 224), (1080, 1920), (333, 7)])
@pytest.mark.parametrize("side", [32, 224])
def test_region_of_a_whole_image(image_size: tuple[int, int], side: int) -> None:
    assert View((side, side), (side, side)).region(image_size) == (0, 0, image_size[1], image_size[0])


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        ((256, 256), (16, 16, 240, 240)),
        ((512, 1024), (64, 32, 960, 480)),
        ((128, 64), (4, 8, 60, 120)),
        # Centres at (i + 0.5) 256 / 100 of the resized image: the first from 16 on is 16.64 (i = 6), the last below
        # 240 is 239.36 (i = 93).
        ((100, 100), (6, 6, 94, 94)),
    ],
)
def test_region_of_the_papers_crop(image_size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert View((256, 256), (224, 224)).region(image_size) == expected


def test_region_of_odd_margins() -> None:
    # Height 101 of 101: rows 20 to 80. Width 51 of 102: a crop from column 10.5 to 30.5 of the image's own pixels,
    # whose first centre is that of column 10.
    assert View((101, 102), (60, 40)).region((101, 51)) == (15, 20, 35, 80)


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_region_holds_the_pixels_whose_centres_were_seen(
    image_size: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int]
) -> None:
    view = View(resized, (min(crop[0], resized[0]), min(crop[1], resized[1])))
    left, top, right, bottom = view.region(image_size)
    for side, start, stop, axis in ((image_size[0], top, bottom, 0), (image_size[1], left, right, 1)):
        assert 0 <= start <= stop <= side
        for pixel in range(side):
            # In integers: twice `side` times the centre's distance from the crop's edge.
            centre = (2 * pixel + 1) * view.resized[axis] - 2 * side * view.offset[axis]
            assert (start <= pixel < stop) == (0 <= centre < 2 * side * view.crop[axis])


def test_region_of_an_image_too_small_to_be_seen() -> None:
    left, top, right, bottom = View((100, 100), (10, 10)).region((2, 2))  # centres at 25 and 75, crop from 45 to 55
    assert left == right <= 2
    assert top == bottom <= 2


# --- cells of a grid -------------------------------------------------------------------------------------------------

PAPER = View((256, 256), (224, 224))


def test_cell_box_with_a_crop_worked_by_hand() -> None:
    # 224 px of crop begin at 16 px of 256. A cell of 56 is 4 px of them: 8 px of 512 rows, 16 px of 1024 columns.
    size, grid = (512, 1024), (56, 56)
    assert PAPER.cell_box(size, grid, 0, 0) == (64, 32, 80, 40)
    assert PAPER.cell_box(size, grid, 55, 1) == (80, 472, 96, 480)
    assert PAPER.cell_box(size, grid, 2, 3, rows=4, columns=2) == (112, 48, 144, 80)


def test_cells_of_a_grid_of_other_proportions() -> None:
    view = View((100, 60), (90, 40))  # offset (5, 10)
    assert view.cell_box((200, 30), (9, 20), 1, 2) == pytest.approx((7, 30, 8, 50))


@pytest.mark.parametrize("view", [PAPER, View((224, 224), (224, 224)), View((101, 102), (60, 40))])
@pytest.mark.parametrize("image_size", [(61, 300), (224, 224), (97, 53)])
def test_all_cells_together_are_the_region(view: View, image_size: tuple[int, int]) -> None:
    left, top, right, bottom = view.cell_box(image_size, (14, 28), 0, 0, rows=14, columns=28)
    x0, y0, x1, y1 = view.region(image_size)  # of whole pixels, whose centres are inside
    assert np.abs(np.subtract((left, top, right, bottom), (x0, y0, x1, y1))).max() <= 0.5


@pytest.mark.parametrize("view", [PAPER, View((101, 102), (60, 40))])
def test_cell_at_is_the_cell_whose_box_holds_the_pixel(view: View, rng: np.random.Generator) -> None:
    size, grid = (333, 214), (14, 9)
    x0, y0, x1, y1 = view.region(size)
    for _ in range(50):
        y, x = int(rng.integers(y0, y1)), int(rng.integers(x0, x1))
        left, top, right, bottom = view.cell_box(size, grid, *view.cell_at(size, grid, y, x))
        assert left <= x + 0.5 < right
        assert top <= y + 0.5 < bottom


def test_cell_at_of_a_pixel_that_was_cropped_is_the_nearest() -> None:
    assert PAPER.cell_at((256, 256), (56, 56), 0, 128) == (0, 28)
    assert PAPER.cell_at((256, 256), (56, 56), 255, 255) == (55, 55)
