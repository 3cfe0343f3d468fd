"""What is on disk, and is it whole? Checkpoints, run folders, weights from elsewhere."""
