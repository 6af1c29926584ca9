"""Front ends: they build a `SparseGraph` over a graph of another world and apply to that graph what was decided."""
