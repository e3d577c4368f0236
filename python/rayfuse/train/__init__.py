"""Train a feature field on posed photographs with the objective of F3RM and nerfstudio."""
