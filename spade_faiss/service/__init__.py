"""The service: images in over HTTP, verdicts out, a page for the person who looks, and a normal set that learns."""

from .settings import ServiceSettings as ServiceSettings

__all__ = ["ServiceSettings"]
