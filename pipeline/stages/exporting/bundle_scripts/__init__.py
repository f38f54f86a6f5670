"""Scripts that a bundle carries, for MONAI has none that does the same: they import numpy, scipy, torch and MONAI only.

`medseg export --format bundle` copies this folder into the bundle as `scripts/`. Written for people who read a bundle
without knowing medseg; each is held equal to medseg's own road by its tests.
"""
