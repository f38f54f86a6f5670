"""Batches of patches: which case, where, changed how; each a function of the seed and its number."""
