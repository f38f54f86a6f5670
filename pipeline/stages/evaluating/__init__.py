"""Labelled cases to score: which, how, and where results land."""
