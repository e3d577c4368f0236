"""Train, export and look at Gaussian splats."""
