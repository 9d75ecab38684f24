"""The search by bounds: a few directions rule most patches out, and what is left is measured. `search` says how.

The neighbours: `gallery` has them, `sources` says where their levels lie, `loading` reads them once, and `prepared`
makes of them what is compared, in `panels`, or `stripes` where a neighbour is larger than a core's cache. `plan`
chooses directions and the kind of products, and `choices` has what was chosen for the next query; `kept` keeps what
was prepared, and `shared` takes it from there, sorted so that most panels are ruled out by their `boxes`.

The comparison: threads share the neighbours (`workers`) or, once these are prepared, the query's patches (`rows`).
`nearby` bounds how far the nearest are, from what lies in the nearest boxes, or around each patch's own place.
`kernels` compares, by `within` where something is known of every patch, and `measure` measures single pairs. `simd` has
the innermost loops; of the kinds of `products`, `products_tiles` is for tile registers (AMX), and `products_bytes`
where there is nothing better than AVX2.
"""
