"""What the loss looks like around a point: intrinsic dimension, curvature, stability."""
