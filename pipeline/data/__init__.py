"""Data sets: their cases, what is decided of them, and what is kept of them."""
