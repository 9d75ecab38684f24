"""The command line: parse, call, print."""

from .main import cli

__all__ = ["cli"]
