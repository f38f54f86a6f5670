"""A batch of volumes to segment: inputs, claims, journal, workers, report."""
