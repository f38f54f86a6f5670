"""From native volumes to the training grid: examination, planning, preprocessing."""
