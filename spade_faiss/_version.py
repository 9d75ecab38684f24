"""The version, for the wheel and for whatever the package writes."""

__version__ = "0.1.0"
