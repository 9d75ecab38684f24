"""The kappa nearest patches among all patches of the K neighbours, exactly."""

from .search import ENGINES, search_patches

__all__ = ["ENGINES", "search_patches"]
