"""Whether the service runs, and whether it takes images: for whoever starts it, and by the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..errors import ServiceError
from ..service import Service
from .access import Ours

router = APIRouter(prefix="/health")


@router.get("/live", response_model=dict[str, Any], summary="Whether the service runs.")
async def live() -> Any:
    """Answer with 200."""
    return {"live": True}


@router.get("/ready", response_model=dict[str, Any], summary="Whether the service takes images.")
async def ready(service: Ours) -> Any:
    """Answer with 200 once the first search has compiled."""
    require_ready(service)
    return {"ready": True}


def require_ready(service: Service) -> None:
    """Check that the first gallery is loaded and has been searched once.

    Raises:
        ServiceError: not yet.
    """
    if not service.is_ready:
        why = service.problem or "The first search is being compiled."
        raise ServiceError(503, "not_ready", why, {"Retry-After": "2"})
