"""The window engine: a patch is compared with those near its own place, and nothing else is computed.

`search` says how. `pieces` compares levels as they are stored, some channels of several neighbours at a time; `kernels`
compares one neighbour after the other, and `simd` has the innermost loops.
"""
