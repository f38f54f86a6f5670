"""How far a label map can be trusted: measured from the logits on the plan's grid, calibrated on validation cases."""
