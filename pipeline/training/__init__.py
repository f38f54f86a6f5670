"""Patches, augmentation, losses and the training loop."""
