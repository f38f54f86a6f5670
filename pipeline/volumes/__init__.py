"""Voxels that know where they are: on disk, in memory, and from one grid to another."""
