"""From an image on the plan's grid to a label map on the native grid."""
