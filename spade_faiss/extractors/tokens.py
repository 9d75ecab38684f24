"""Tokens of vision transformers: which blocks are levels, and whether a network has the tokens that are asked for."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import OptionError
from ..options import FeatureOptions


def require_no_tokens(name: str, options: FeatureOptions) -> None:
    """Check that nothing is asked of an extractor that only a vision transformer has.

    Args:
        name: the extractor's, as users wrote it.
        options: as given.

    Raises:
        OptionError: a class token, normalised tokens or blocks (unless levels are named) are asked for; it says what to
            take instead of each.
    """
    asked = [
        (option, trait, instead)
        for option, trait, instead, given in (
            ("image_feature", "with a class token", 'image_feature="pooled"', options.image_feature == "class_token"),
            ("tokens", "whose tokens can be normalised", 'tokens="plain"', options.tokens == "normalised"),
            ("blocks", "whose blocks share one grid", "levels or strides", options.blocks and not options.levels),
        )
        if given
    ]
    if asked:
        option, trait, _ = asked[0]
        raise _refused(option, trait, name, ", ".join(instead for _, _, instead in asked))


def require_tokens(name: str, model: Any, options: FeatureOptions) -> None:
    """Check that a timm model whose blocks share one grid has the tokens that are asked for.

    Args:
        name: the extractor's, as users wrote it.
        model: has forward_intermediates.
        options: as given.

    Raises:
        OptionError: it has no class token, or does not tell its tokens apart.
    """
    separate = {"norm", "return_prefix_tokens"} <= set(inspect.signature(model.forward_intermediates).parameters)
    # Asked for by its name: without a class token, the first token of the prefix is a register.
    has_class = getattr(model, "cls_token", None) is not None
    if options.image_feature == "class_token" and not (separate and has_class):
        found = f"{name}, whose class token timm does not return" if has_class else f"{name}, which has none"
        raise _refused("image_feature", "with a class token", found, 'image_feature="pooled"')
    if options.tokens == "normalised" and not separate:
        raise _refused("tokens", "whose tokens can be normalised", name, 'tokens="plain"')


def _refused(option: str, trait: str, found: str, instead: str) -> OptionError:
    return OptionError(f"{option}: expected a vision transformer {trait}, found {found}; take {instead}")


def blocks_at(shares: tuple[float, ...], depth: int) -> list[int]:
    """Return the blocks, counted from 0, at shares of the depth: share x depth, rounded down, at most the last block.

    Raises:
        OptionError: two shares are the same block.

    Example:
        >>> blocks_at((0.25, 0.5, 0.75, 1), 12), blocks_at((0.25, 0.5, 0.75, 1), 24)
        ([3, 6, 9, 11], [6, 12, 18, 23])
    """
    blocks = [min(depth - 1, int(share * depth + 1e-9)) for share in shares]  # 1/3 of 12 is block 4, however it rounds
    if len(set(blocks)) < len(blocks):
        raise OptionError(f"blocks: expected shares of different blocks, found blocks {blocks} of {depth}; take levels")
    return blocks
