"""Structures counted lesion by lesion: connected components of prediction and reference, one matched with one."""
