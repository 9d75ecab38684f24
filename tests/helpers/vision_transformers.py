"""Tiny vision transformers with random weights, of every kind of prefix and position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

# timm names few tiny ones; these are made so: with registers, without position embeddings, with a hidden class token.
TINY: dict[str, dict[str, int]] = {
    "vit_small_patch14_reg4_dinov2": {"img_size": 70, "embed_dim": 32, "depth": 12, "num_heads": 2},
    "vit_small_patch16_dinov3": {"embed_dim": 32, "depth": 12, "num_heads": 2},
    "cait_xxs24_224": {"embed_dim": 32, "depth": 4, "num_heads": 2},
}


def make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have timm.create_model make those of TINY small, whoever calls it."""
    create = timm.create_model

    def made(name: str, *args: Any, **options: Any) -> Any:
        return create(name, *args, **{**TINY.get(name, {}), **options})

    monkeypatch.setattr(timm, "create_model", made)


def with_random_weights(name: str, folder: Path) -> tuple[Any, Path]:
    """A network in evaluation mode, and the file of its weights."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for parameter in model.parameters():  # norms too, and what is scaled to almost nothing when it is made
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(model.state_dict(), path := folder / f"{name}.pth")
    return model.eval(), path
