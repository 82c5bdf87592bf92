"""One file for each encoder family. `simmim.torch_engine.models.family` finds them by iterating this package."""
