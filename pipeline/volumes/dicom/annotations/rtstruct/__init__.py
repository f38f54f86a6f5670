"""RTSTRUCT: contours traced and filled, the object written and read."""
