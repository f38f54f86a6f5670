"""What a trained model becomes for other software: programs of its network, a MONAI bundle, and how near they come."""
