"""What a training says of itself: where its time goes, where it stands still, where a number stopped being finite."""
