"""nerfacc.estimators: where along rays to take samples."""
