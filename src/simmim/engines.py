"""Dispatch to the configured engine. Engines do not know each other; each is loaded on first use."""

from simmim.config.pretraining import PretrainConfig
from simmim.training.loop import Outcome
from simmim.training.run_directory import Run


def pretrain(config: PretrainConfig) -> tuple[Run, Outcome]:
    """Pretrain, or resume, with the engine of the configuration; see `simmim.pretrain`."""
    if config.engine == "keras":
        from simmim.keras_engine import use_backend

        use_backend(config.backend or "jax")
        from simmim.keras_engine.pretrain import pretrain
    else:
        from simmim.torch_engine.train.pretrain import pretrain
    return pretrain(config)
