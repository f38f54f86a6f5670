"""DICOM series: found in a folder, chosen, judged and read. DICOM's LPS millimetres become RAS+ here."""
