"""Which model a set of weights is of: the recipes' own, built without memory, must be found again."""

import re
from dataclasses import replace

import pytest

from simmim.config.pretrain_recipes import find_recipe
from simmim.interop.infer_model import infer

torch = pytest.importorskip("torch")


def shapes(recipe):
    """Weights of a recipe's backbone that have shapes only, and its buffers."""
    from simmim.torch_engine.models.encoders import create_backbone

    with torch.device("meta"):
        backbone = create_backbone(recipe.model, image_size=recipe.image_size, model_args=recipe.model_args)
    return backbone.state_dict(), dict(backbone.named_buffers())


@pytest.mark.parametrize(
    "name",
    [
        "simmim-vit-b-800ep",
        "simmim-swin-b-100ep",
        "simmim-swin-b-800ep",
        "simmim-swin-l-800ep",
        "simmim-swinv2-b-800ep",
        "mae-like-vit-b",
        "small",
    ],
)
def test_a_recipes_model_is_found_from_its_weights(name):
    recipe = find_recipe(name)
    found = infer(*shapes(recipe), {})
    assert found is not None
    assert (found.model, found.image_size) == (recipe.model, recipe.image_size)
    assert found.model_args.items() <= recipe.model_args.items()
    again = replace(recipe, model_args=found.model_args)
    assert [tensor.shape for tensor in shapes(again)[0].values()] == [t.shape for t in shapes(recipe)[0].values()]


def test_what_came_with_the_weights_goes_before_what_they_tell():
    recipe = find_recipe("simmim-swin-l-800ep")
    weights, _ = shapes(recipe)
    assert infer(weights, {}, {}).image_size == (384, 384)  # that of one window in the last stage
    assert infer(weights, {}, {"image_size": (192, 192)}).image_size == (192, 192)


def test_a_vit_of_unknown_width_needs_its_heads_told():
    weights, buffers = shapes(find_recipe("small"))
    weights["patch_embed.proj.weight"] = torch.empty(100, 3, 16, 16, device="meta")
    with pytest.raises(ValueError, match=re.escape("a ViT of 100 features and 12 blocks does not tell")):
        infer(weights, buffers, {})
    assert infer(weights, buffers, {"num_heads": 5}).model_args["num_heads"] == 5


def test_weights_of_another_family_tell_nothing():
    assert infer({"conv1.weight": torch.empty(64, 3, 7, 7, device="meta")}, {}, {}) is None
