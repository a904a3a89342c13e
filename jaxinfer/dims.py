"""The dimension key: one letter for one size, in signatures and einsum strings alike.

    B  slots or rows of this step     N  query heads            P  pages in the pool
    T  tokens of a row in this step   K  kv heads               C  tokens in a page
    S  cached tokens                  G  query heads a kv head  M  pages of a sequence
    L  layers                         H  size of a head         E  experts
    D  model width                    F  feed-forward width     V  vocabulary

X, Y and Z name mesh axes and nothing else.
"""

from typing import Any

Leaf = Any
"""One leaf of a tree: an array, or what stands for one (a spec, a sharding, an abstract value)."""
