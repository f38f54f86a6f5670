"""Metrics, statistics and reports of predictions against references."""
