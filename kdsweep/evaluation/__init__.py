"""What a trained network is worth: scores of each image, and the time it takes."""
