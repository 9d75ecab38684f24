"""The pyramid engine: products of levels at their own resolution are upsampled, in place of the features.

`search` says how, `plan` is what is prepared once for a query, and `kernels` and `simd` are its compiled loops.
"""
