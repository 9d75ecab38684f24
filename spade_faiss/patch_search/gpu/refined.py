"""Some query patches in doubt, looked through on a torch device: nothing waits for it.

Nearly every query has a few patches that candidates could not decide. Of those, all patches of the likeliest units are
measured. What is in doubt even then, or is one too many, is left to `settled`, for which the host waits.
"""

from __future__ import annotations

import torch

from .candidates import SPARE, Chosen, Search, beyond, nearest_of
from .tiles_torch import GROUPS, padded_cells

LANES = 256  # query patches of a query
MORE = 4  # units beyond those of which candidates were measured
PAIRS = 2**18  # measured at the most


def refined(search: Search, chosen: Chosen) -> Chosen:
    """Return what was measured with fewer patches in doubt."""
    (b, q, kappa), cells, device = chosen.best.shape, search.upsampler.cells, chosen.best.device
    units = min(chosen.units, kappa + SPARE + MORE)
    members = cells if search.distinct else padded_cells(cells) // GROUPS
    count = min(q, LANES, PAIRS // (b * units * members))
    if count == 0 or (units if search.distinct else units * members) < kappa:
        return chosen
    lanes = chosen.undecided.float().topk(count, dim=1).indices  # some of them are decided, if there are fewer
    floats, firsts = _of(chosen.floats, lanes), _of(chosen.ints[..., :units], lanes)[..., None]
    member = torch.arange(members, device=device)
    inside = member.expand(*firsts.shape[:-1], -1) if search.distinct else firsts % cells % GROUPS + GROUPS * member
    places = torch.div(firsts, cells, rounding_mode="floor") * cells + inside
    was_undecided = chosen.undecided.gather(1, lanes)
    is_patch = (firsts >= 0) & (inside < cells) & was_undecided[..., None, None]
    if search.window:
        is_patch &= search.window.has(lanes[..., None, None], inside)
    queries = torch.arange(b, device=device)[:, None, None, None].expand(places.shape)
    each = (queries, lanes[:, :, None, None].expand(places.shape), torch.where(is_patch, places, -1))
    sums = search.measured(*(part.reshape(-1) for part in each)).view(places.shape)
    sums = torch.where(is_patch, sums, torch.inf)
    places = torch.where(is_patch, places, search.k * cells)
    if search.distinct:
        sums, places = nearest_of(sums, places, 1)
    best, at = nearest_of(sums.flatten(2), places.flatten(2), kappa)
    reach = search.reach(best[..., -1:], lanes)[..., 0]
    is_decided = beyond(floats[..., 2 * chosen.units], reach)
    if units < chosen.units:
        is_decided &= beyond(floats[..., units], reach)  # the least bound of the units that were left out
    new, rows = (was_undecided & is_decided)[..., None], lanes[..., None].expand(-1, -1, kappa)
    return chosen._replace(
        best=chosen.best.scatter(1, rows, torch.where(new, best, chosen.best.gather(1, rows))),
        at=chosen.at.scatter(1, rows, torch.where(new, at, chosen.at.gather(1, rows))),
        undecided=chosen.undecided.scatter(1, lanes, was_undecided & ~is_decided),
    )


def _of(values: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
    """Return rows (b, n, m) of values (b, q, m)."""
    return values.gather(1, lanes[..., None].expand(-1, -1, values.shape[2]))
