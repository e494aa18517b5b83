"""What the spectrum of a weight says: norms, ranks, noise edges, tails, defects."""
