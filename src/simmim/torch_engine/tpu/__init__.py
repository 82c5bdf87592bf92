"""Training steps lowered for the TPU compiler."""
