"""Work shared out over the machines of a Ray cluster."""
