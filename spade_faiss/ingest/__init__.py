"""Folders of images into a store: read, decoded, extracted and written at the same time."""

from .estimate import Estimate
from .pipeline import IngestReport, Skipped, ingest
from .workers import ingest_in_processes

__all__ = ["Estimate", "IngestReport", "Skipped", "ingest", "ingest_in_processes"]
