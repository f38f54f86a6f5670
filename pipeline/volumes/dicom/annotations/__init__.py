"""DICOM objects that hold label maps, SEG and RTSTRUCT: written for their series, and read onto it."""
