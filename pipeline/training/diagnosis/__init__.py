"""What a training says of itself: where its time goes, where it stands still, and where a number stopped being finite."""
