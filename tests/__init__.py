"""Tests: a folder for each room of the package; `helpers` is what they share, `reference` the oracle."""
