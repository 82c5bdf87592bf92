"""Export to Transformers: its native model if there is an equal one, else its wrapper of timm models.

Shapes: `B` images, `C` channels, `H W` pixels.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simmim.errors import UserError
from simmim.interop.weight_names import to_transformers
from simmim.torch_engine.interop.export import Source, arrays, compare, lost_head, probe_mask, refuse_loss, write_hub
from simmim.torch_engine.models.masked_image_model import MaskedImageModel

# timm's class → Transformers' model type and the exported class.
_HOMES = {
    "VisionTransformer": ("vit", "ViTForMaskedImageModeling"),
    "SwinTransformer": ("swin", "SwinForMaskedImageModeling"),
    "SwinTransformerV2": ("swinv2", "Swinv2ForMaskedImageModeling"),
    "Beit": ("beit", "BeitModel"),
}


def export_transformers(source: Source, out: Path, allow_loss: bool) -> list[str]:
    """Export a directory for `from_pretrained`, with the head for pixels where Transformers has it."""
    transformers = _transformers()
    if source.config is None or not source.config.reconstructs:
        return _export_wrapped(source, out, transformers)
    assert source.model is not None
    kind, name = _HOMES.get(type(source.backbone).__name__, (None, ""))
    why = _why_another(source, kind)
    lost = ["the mask token", "the head"] if why else []
    if not why and (head := "the head" if kind == "beit" else lost_head(source.model)):
        lost = [head]
    if lost:
        home = f"Transformers ({why})" if why else f"Transformers' {name}"
        native = kind == "beit" and not why
        instead = f"writes {name} with the mask token" if native else "writes its wrapper of the timm module"
        refuse_loss(source, home, lost, instead, allow_loss)
        if not native:
            return _export_wrapped(source, out, transformers)
    assert kind is not None
    _write(source, out, kind, name)
    try:
        with _quiet(transformers):
            theirs, report = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    except RuntimeError:  # a shape that differs; its report names none
        raise UserError(f"Transformers' {name} has other shapes than {source.run}; use --format timm") from None
    if odd := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise UserError(f"Transformers' {name} and {source.run} do not agree on {odd[0]!r}; use --format timm")
    pairs = _pairs(source, source.model, theirs.eval())
    return [f"wrote {name}", compare(source, "Transformers", pairs, source.images())]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("--format transformers needs the package: pip install 'simmim[interop]'") from None
    return transformers


def _why_another(source: Source, kind: str | None) -> str | None:
    """Explain why Transformers' model differs from this one; `None` if it does not."""
    backbone, (_, height, width) = source.backbone, source.input_size
    assert source.model is not None
    if kind is None:
        return f"which has no {type(backbone).__name__}"
    if height != width:
        return "whose models reconstruct square images"
    try:
        to_transformers(arrays(source.model), kind)
    except UserError as error:
        return f"whose {kind} is another model: {error}"
    places = 1 + backbone.patch_embed.num_patches
    if kind == "vit" and (backbone.pos_embed is None or backbone.pos_embed.shape[1] != places):
        return "whose vit has a class token and positions for it and every patch"
    if kind == "swin" and len({block.window_size for layer in backbone.layers for block in layer.blocks}) > 1:
        return "whose swin has one window in all stages, where a stage smaller than the window has a smaller one here"
    return None


def _write(source: Source, out: Path, kind: str, name: str) -> None:
    assert source.model is not None
    state = to_transformers(arrays(source.model), kind)
    save_file(
        {key: torch.from_numpy(array).contiguous() for key, array in state.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = {
        "architectures": [name],
        "model_type": kind,
        "image_size": source.input_size[1],
        "num_channels": source.input_size[0],
        **_SETTINGS[kind](source.backbone),
    }
    (out / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if source.input_size[0] == 3:  # its processors accept no other images
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": source.input_size[1], "width": source.input_size[2]},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(source.mean),
            "image_std": list(source.std),
        }
        (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")


def _plain(backbone: Any) -> dict[str, Any]:
    block = backbone.blocks[0]
    return {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": backbone.norm.eps,
        "patch_size": backbone.patch_embed.patch_size[0],
    }


def _vit(backbone: Any) -> dict[str, Any]:
    bias = backbone.blocks[0].attn.qkv.bias is not None
    return {**_plain(backbone), "qkv_bias": bias, "encoder_stride": backbone.patch_embed.patch_size[0]}


def _beit(backbone: Any) -> dict[str, Any]:
    block = backbone.blocks[0]
    return {
        **_plain(backbone),
        "use_mask_token": True,
        "use_absolute_position_embeddings": backbone.pos_embed is not None,
        "use_relative_position_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_relative_position_bias": backbone.rel_pos_bias is not None,
        "layer_scale_init_value": 0.0 if block.gamma_1 is None else 0.1,  # creates the parameter; its weights follow
        "use_mean_pooling": False,  # otherwise its last hidden state is not normalised
        "drop_path_rate": 0.0,
    }


def _swin(backbone: Any) -> dict[str, Any]:
    block = backbone.layers[0].blocks[0]
    return {
        "patch_size": backbone.patch_embed.patch_size[0],
        "embed_dim": backbone.embed_dim,
        "depths": [len(layer.blocks) for layer in backbone.layers],
        "num_heads": [layer.blocks[0].attn.num_heads for layer in backbone.layers],
        "window_size": block.window_size[0],
        "mlp_ratio": block.mlp.fc1.out_features / block.mlp.fc1.in_features,
        "qkv_bias": any(name.endswith("bias") and "q" in name for name, _ in block.attn.named_parameters()),
        "layer_norm_eps": backbone.norm.eps,
        "encoder_stride": backbone.feature_info[-1]["reduction"],
        "drop_path_rate": 0.0,
    }


def _swinv2(backbone: Any) -> dict[str, Any]:
    known = [layer.blocks[0].attn.pretrained_window_size[0] for layer in backbone.layers]
    return {**_swin(backbone), "pretrained_window_sizes": known}


_SETTINGS = {"vit": _vit, "beit": _beit, "swin": _swin, "swinv2": _swinv2}


def _pairs(source: Source, model: MaskedImageModel, theirs: Any) -> list[Any]:
    """List the outputs to compare: tokens of BeitModel; of others pixels (B, C, H, W) and, if equal, the loss."""
    assert source.config is not None
    mask = probe_mask(source, model, source.config)
    flat = mask.flatten(1)
    if theirs.config.model_type == "beit":
        encoder = model.encoder
        return [
            (
                "features",
                lambda images: encoder(images, mask).flatten(1, 2),
                lambda images: theirs(images, bool_masked_pos=flat).last_hidden_state[:, 1:],
            )
        ]
    pairs = [
        (
            "reconstruction",
            lambda images: model(images, mask)[1],
            lambda images: theirs(images, bool_masked_pos=flat).reconstruction,
        )
    ]
    if (model.target.kind, model.loss.kind) == ("pixels", "l1"):  # its only loss
        loss = ("loss", lambda images: model(images, mask)[0], lambda images: theirs(images, bool_masked_pos=flat).loss)
        pairs.append(loss)
    return pairs


def _export_wrapped(source: Source, out: Path, transformers: Any) -> list[str]:
    """Export the wrapper of timm models: encoder or classifier."""
    write_hub(source, out)
    kind = transformers.AutoModelForImageClassification if source.classes else transformers.AutoModel
    with _quiet(transformers):
        theirs = kind.from_pretrained(out).eval()

    def ours(images: Tensor) -> Tensor:
        return source.backbone(images) if source.classes else source.backbone.forward_features(images)

    def reloaded(images: Tensor) -> Tensor:
        found = theirs(images)
        return found.logits if source.classes else found.last_hidden_state

    same = compare(source, "Transformers", [("output", ours, reloaded)], source.images())
    return [f"wrote {type(theirs).__name__}", same]


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and warnings about newly initialised weights, which the comparison would detect."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
