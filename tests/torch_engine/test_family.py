"""Facts of the encoder families that sharding and fine-tuning rely on."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from simmim.torch_engine.models import family
from simmim.torch_engine.models.family import blocks_to_shard, find_family
from simmim.torch_engine.models.heads import TransformerDecoder
from simmim.torch_engine.train.storage import build_step

from . import tiny

every_kind = pytest.mark.parametrize("kind", tiny.KINDS)


@every_kind
def test_every_block_of_an_encoder_is_sharded_by_itself(kind: str) -> None:
    encoder = tiny.encoder(kind)
    if isinstance(encoder.backbone.feature_info[-1]["module"], str) and hasattr(encoder.backbone, "blocks"):
        expected = len(encoder.backbone.blocks)
    else:
        stages = [encoder.backbone.get_submodule(info["module"]) for info in encoder.backbone.feature_info[-4:]]
        expected = sum(len(getattr(stage, "blocks", list(stage.children()))) for stage in stages)
    assert len(blocks_to_shard(encoder)) == expected


def test_the_blocks_of_a_transformer_head_are_sharded_too() -> None:
    assert len(blocks_to_shard(TransformerDecoder(8, 4, width=32, depth=3))) == 3


def test_an_encoder_whose_family_names_no_blocks_is_not_sharded_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    families = [dataclasses.replace(each, blocks=()) for each in family.all_families()]
    monkeypatch.setattr(family, "_own_families", lambda: tuple(families))
    with pytest.raises(ValueError, match=r"^--shard needs the block classes of Beit, and its family"):
        blocks_to_shard(nn.ModuleList([tiny.encoder("beit"), TransformerDecoder(8, 4, width=32, depth=1)]))


@pytest.mark.parametrize(
    ("model", "decay"), [("vit_tiny_patch16_224", 0.65), ("swinv2_tiny_window8_256", 0.8), ("resnet18", 1.0)]
)
def test_layer_decay_is_the_familys(model: str, decay: float) -> None:
    assert find_family(model).layer_decay == decay


@pytest.mark.parametrize("others", [{}, {"encode": "visible", "head": "transformer"}])
@every_kind
def test_a_discarded_model_frees_its_memory_without_the_garbage_collector(kind: str, others: dict[str, str]) -> None:
    if others and find_family(tiny.KINDS[kind].model).visible_encoder is None:
        pytest.skip("no encoder of visible patches")
    if others and kind.startswith("swin"):
        others = others | {"mask": "uniform", "mask_cell": 16, "mask_ratio": 0.75}  # type: ignore[dict-item]
    settings = tiny.config(kind, drop_path=0.1, **others)
    batch = {name: torch.from_numpy(array) for name, array in tiny.batch(settings).items()}
    gc.collect()
    gc.disable()
    try:
        step = build_step(settings)
        step(**batch)["loss"].backward()
        parameters = [weakref.ref(parameter) for parameter in step.parameters()]
        del step
        assert [ref for ref in parameters if ref() is not None] == []
    finally:
        gc.enable()
