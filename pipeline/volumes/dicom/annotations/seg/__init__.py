"""DICOM SEG: written through highdicom, read frame by frame."""
