"""Folders of images into a gallery: read, decoded, extracted and written at the same time."""

from .estimate import Estimate
from .pipeline import IngestOptions, IngestReport, Skipped, ingest
from .workers import ingest_in_processes

__all__ = ["Estimate", "IngestOptions", "IngestReport", "Skipped", "ingest", "ingest_in_processes"]
