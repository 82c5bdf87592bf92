"""One file for each objective. `simmim.torch_engine.models.objective` finds them by iterating this package."""
