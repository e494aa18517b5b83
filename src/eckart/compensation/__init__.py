"""Low-rank repair of what compression, quantisation or pruning lost."""
