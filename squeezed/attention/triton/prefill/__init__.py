"""The user's tokens over a context on a GPU: lookup by blocks, a plan of tiles, attention.

Arguments that belong together are tuples of one name, in the launchers and in all kernels. `T` are
tiles, `W` their parts of `BLOCK_M` query rows, `[capacity]` the entries for which a list has room:

    query            queries [B, Hq, Q, D], strides of requests, heads and rows
    context          keys and values [Hkv, P, D]
    suffix_keys      [B, Hkv, S, D], strides of requests, heads and tokens; so suffix_values
    level            centroids [Hkv, C, D], variance [Hkv, C], key, member offsets [Hkv, C + 1]
    levels           of every level centroids and mean values [Hkv, C, D], C
    candidates       nodes [T, C] of a level that a tile still weighs, how many [T]
    kept             rows [T, capacity] that a tile reads, how many [T]
    far, dropped     nodes that it does not, their log sizes and variances [T, C], how many [T]
    plan             ends [W] and bounds [W, CLASSES] of tiles in the line of units
    partials         outputs [slots, BLOCK_M, D], log masses and summed variances [slots, BLOCK_M]

What differs from prompt to prompt stays outside of them: see `plan.LENGTHS`. A running softmax is
`peak, mass, acc`, as in `squeezed.attention.triton.decode`.
"""
