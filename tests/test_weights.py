"""Maps of names: what other packages write, read back to the last bit."""

import re

import numpy as np
import pytest

from simmim.interop.weight_names import (
    DIALECTS,
    from_official_simmim,
    from_official_swin,
    from_timm,
    from_transformers,
    to_official_simmim,
    to_timm,
    to_transformers,
)


def arrays(**shapes):
    rng = np.random.default_rng(0)
    return {name.replace("__", "."): rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


OFFICIAL_SWIN = arrays(
    encoder__mask_token=(1, 1, 8),
    encoder__patch_embed__proj__weight=(8, 3, 4, 4),
    encoder__layers__0__blocks__0__attn__qkv__weight=(24, 8),
    encoder__layers__0__downsample__reduction__weight=(16, 32),
    encoder__layers__1__blocks__0__attn__relative_position_bias_table=(49, 2),
    encoder__norm__weight=(16,),
    decoder__0__weight=(192, 16, 1, 1),
    decoder__0__bias=(192,),
)


def test_official_swin_downsamples_one_stage_earlier_than_timm():
    mapped = from_official_swin(arrays(layers__0__downsample__norm__weight=(32,), norm__weight=(8,)))
    assert list(to_timm(mapped.state)) == ["layers.1.downsample.norm.weight", "norm.weight"]


def test_official_simmim_comes_back_bit_identical():
    assert same(to_official_simmim(from_official_simmim(OFFICIAL_SWIN).state), OFFICIAL_SWIN)


def test_official_decoder_becomes_a_linear_head():
    state = from_official_simmim(OFFICIAL_SWIN).state
    assert state["head.weight"].shape == (192, 16)


def test_buffers_and_classifiers_are_left_out_with_a_reason():
    state = arrays(layers__0__blocks__1__attn_mask=(4, 4), head__weight=(10, 8), norm__weight=(8,))
    assert from_official_swin(state).left_out == {
        "layers.0.blocks.1.attn_mask": "computed again",
        "head.weight": "a classifier",
    }


def test_mae_decoder_and_its_mask_token_are_left_out():
    mapped = from_timm(arrays(cls_token=(1, 1, 8), mask_token=(1, 1, 4), decoder_embed__weight=(4, 8)))
    assert set(mapped.left_out) == {"mask_token", "decoder_embed.weight"}


def test_unknown_transformers_name_is_refused_by_name():
    with pytest.raises(ValueError, match=re.escape("holds 'encoder.layer.0.adapter.weight'")):
        from_transformers(arrays(vit__encoder__layer__0__adapter__weight=(2, 2)), "vit")


def test_a_query_without_key_and_value_is_refused():
    with pytest.raises(ValueError, match=r"has only query of the three parts of 'blocks\.0\.attn\.qkv\.weight'"):
        from_transformers(arrays(vit__encoder__layer__0__attention__attention__query__weight=(2, 2)), "vit")


def tiny(kind):
    transformers = pytest.importorskip("transformers")
    token = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    stage = {"patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
    return {
        "vit": lambda: transformers.ViTForMaskedImageModeling(
            transformers.ViTConfig(**token, image_size=32, patch_size=16)
        ),
        "swin": lambda: transformers.SwinForMaskedImageModeling(
            transformers.SwinConfig(**stage, image_size=32, encoder_stride=8)
        ),
        "swinv2": lambda: transformers.Swinv2ForMaskedImageModeling(
            transformers.Swinv2Config(**stage, image_size=32, encoder_stride=8)
        ),
        "beit": lambda: transformers.BeitModel(
            transformers.BeitConfig(
                **token,
                image_size=32,
                patch_size=16,
                use_mask_token=True,
                use_relative_position_bias=True,
                use_shared_relative_position_bias=True,
                use_absolute_position_embeddings=True,
            )
        ),
    }[kind]()


def written(model, directory):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("kind", DIALECTS)
def test_what_transformers_writes_comes_back_bit_identical(kind, tmp_path):
    state = written(tiny(kind), tmp_path)
    assert same(to_transformers(from_transformers(state, kind).state, kind), state)


@pytest.mark.parametrize("kind", DIALECTS)
def test_names_in_memory_and_on_disk_mean_the_same(kind, tmp_path):
    model = tiny(kind)
    on_disk = from_transformers(written(model, tmp_path), kind).state
    in_memory = from_transformers({name: value.numpy() for name, value in model.state_dict().items()}, kind).state
    assert same(in_memory, on_disk)
