"""Rules chosen on out-of-fold predictions."""
