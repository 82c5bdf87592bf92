"""Encoder families: the facts that the models of a timm file share.

Each file in `families/` describes one family. To add a family, add a file there, or call `register_family` for models
of your own that you registered with timm.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
from torch import nn

from simmim.errors import UserError
from simmim.torch_engine.models.masked import Encoder
from simmim.torch_engine.models.savings import LastBlock


@dataclass(frozen=True, kw_only=True)
class Family:
    """Describe how to mask, fine-tune and shard the models of a family."""

    name: str
    """Pattern of the timm model names, for messages: `vit_*`."""
    modules: tuple[str, ...]
    """Python modules whose functions build the models (those with `@timm.models.register_model`)."""
    excludes: tuple[str, ...] = ()
    """Parts of model names that do not belong to the family."""
    encoder: Callable[[nn.Module], Encoder]
    """Wrap a timm module so that it takes a mask."""
    visible_encoder: Callable[[nn.Module], Encoder] | None = None
    """Wrap a timm module so that it sees visible patches only (`--encode visible`)."""
    needs_all_patches: str = ""
    """Reason why the family has no encoder of visible patches, to follow "which"."""
    takes_image_size: bool = True
    """Whether the models take `img_size`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the models when they are pretrained."""
    blocks: tuple[type[nn.Module], ...] = ()
    """Classes of the blocks. FSDP2 shards each block as one unit."""
    last_blocks: Mapping[type[nn.Module], type[LastBlock]] = field(default_factory=dict)
    """Subclasses of blocks that can compute some tokens only. The last block of an encoder becomes one."""
    layer_decay: float = 1.0
    """Default layer decay of fine-tuning."""
    stage_norms: tuple[bool, bool, bool, bool] | None = None
    """Whether each of the last four stages ends with a norm. `None` for a plain transformer, which has no stages."""

    def covers(self, architecture: str) -> bool:
        """Return whether a model that timm knows belongs to the family."""
        module = timm.models.model_entrypoint(architecture).__module__
        return module in self.modules and not any(part in architecture for part in self.excludes)


_registered: list[Family] = []


def register_family(family: Family) -> None:
    """Add a family for models that are registered with timm. A later family takes precedence."""
    _registered.insert(0, family)


@cache
def _own_families() -> tuple[Family, ...]:
    package = importlib.import_module("simmim.torch_engine.models.families")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(f"{package.__name__}.{name}").FAMILY for name in names)


def all_families() -> tuple[Family, ...]:
    """Return the registered families, then those of the package in the order of their file names."""
    return (*_registered, *_own_families())


def find_family(model: str) -> Family:
    """Return the family of a timm model name.

    Raises:
        UserError: timm does not know the name, or no family covers the model.
    """
    architecture = model.split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"model {model!r} is not known to timm {timm.__version__}; {remedy}")
    for family in all_families():
        if family.covers(architecture):
            return family
    names = ", ".join(family.name for family in all_families())
    raise UserError(f"model {model!r} cannot take a mask; use one of the families {names}")


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that are blocks of a family, of encoders and transformer heads alike."""
    kinds = tuple({kind for family in all_families() for kind in family.blocks})
    return [module for module in model.modules() if isinstance(module, kinds)]


def blocks_to_shard(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 shards as one unit each.

    Raises:
        UserError: an encoder has no such block, so that sharding would gather the whole encoder at once.
    """
    for module in model.modules():
        if isinstance(module, Encoder) and not find_blocks(module):
            kind = type(module.backbone).__name__
            raise UserError(
                f"--shard needs the block classes of {kind}, and its family names none of them; "
                "add them to `Family.blocks`, or leave --shard out"
            )
    return find_blocks(model)
