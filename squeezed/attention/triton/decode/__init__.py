"""One new token over a context on a GPU, in four launches.

Arguments that belong together are tuples of one name, in the launcher and in all kernels. `Z` are
problems, `R` the query rows of one, `[capacity]` the entries for which a list has room:

    query      queries [B, Hq, 1, D], strides of requests and heads
    context    keys and values [Hkv, P, D], P
    level      centroids [Hkv, C, D], variance [Hkv, C], key and child offsets [Hkv, C + 1], C
    suffix     keys and values [B, Hkv, S, D], their strides of requests, heads and tokens
    mask       which of its tokens a request sees [B, 1, 1, S], strides of requests and tokens
    valid      which requests are no padding [B, 1], their stride
    norms      parts of the normaliser: peaks and masses [Z, splits, R], splits
    kept       runs of kept rows, who keeps them [Z, capacity], capacity
    turning    what turns queries [Hkv, D, D], turned ones [Z, 2 R, D], their units [Z, 2, R]
    coded      codes of keys and values [Hkv, n, ..], scales of both [Hkv, n], n, of encoded rows
    far        dropped nodes, their variances [Z, capacity] and log masses [.., R], capacity
    partials   sums [slots, R, D], peaks and masses [slots, R]

A running softmax is three values: `peak`, the greatest logit so far; `mass`, the sum of weights
relative to it; `acc`, the values in these weights.
"""
