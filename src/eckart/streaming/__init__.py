"""Models larger than memory: one block at a time, from file to file."""
