"""Galleries in object stores: push a folder, pull it, read one in place through a bounded local cache."""

from .address import Address, is_address
from .files import RemoteFiles, open_snapshot
from .local_cache import LocalCache
from .pull import Pulled
from .push import Pushed

__all__ = ["Address", "LocalCache", "Pulled", "Pushed", "RemoteFiles", "is_address", "open_snapshot"]
