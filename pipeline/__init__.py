"""medseg: 3D medical image segmentation, from a dataset manifest to label maps of new volumes."""

__version__ = "0.1.0"
