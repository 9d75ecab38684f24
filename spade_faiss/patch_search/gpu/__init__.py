"""The searches on a GPU, in torch and Triton. Nothing waits for the device but what only the host can settle.

`search` takes all patches: `patches` upsamples levels, `tiles` multiplies by what is fastest (`tiles_torch`,
`tiles_triton`), `candidates` measures what is likely, `refined` what rounding could have hidden, and `settled` what is
in doubt even then. `spaced` searches all levels with their spacing at once, `recorded` starts again what was searched
before at the same sizes, and `memory` says what a search takes.
"""
