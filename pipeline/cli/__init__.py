"""The `medseg` command."""

from pipeline.cli.app import app, main

__all__ = ["app", "main"]
