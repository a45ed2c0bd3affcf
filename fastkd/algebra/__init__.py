"""Closed forms in torch's own operations, on any device: where a matrix product is all the work, no kernel helps."""
