"""The shape of data and of representations: dimension, entropy, collapse, alignment, margins."""
