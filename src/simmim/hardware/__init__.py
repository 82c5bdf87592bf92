"""Facts about processors and accelerators, the roofline model, and the TPU compiler."""
