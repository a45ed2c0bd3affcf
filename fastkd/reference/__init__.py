"""What each loss is: eager PyTorch on any device, in float64 the oracle of every test, and the last resort."""
