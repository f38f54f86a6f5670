"""The formats of volumes: bytes on disk become headers and voxels as they are stored."""
