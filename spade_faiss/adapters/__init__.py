"""The tools that users already live in: one module each, imported only where it is used."""
