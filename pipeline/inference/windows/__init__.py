"""Windows over a volume: where they lie, what they weigh, and how their logits leave in order, plane by plane."""
