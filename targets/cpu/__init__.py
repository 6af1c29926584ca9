"""What CPUs have in common: how work is cut for their caches and threads, and what a model of their costs counts."""
