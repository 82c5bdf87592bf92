"""Recipes that predict pixels, or what is computed of them: SimMIM's own, and after A2MIM, MAE, UM-MAE and FastMIM.

To add a recipe, add a function here. The user sets the data, the run directory and the machine. Batch sizes are global:
with world size K and M accumulation steps (`--accumulate-steps M`), each rank holds batch / (K·M) images at a time.
Every K and M trains alike, except for batch norms, which see one part of a batch.
"""

from dataclasses import replace

from simmim.config.pretraining import PretrainConfig
from simmim.config.recipe_registry import recipe
from simmim.method.heads import LinearHead, TransformerHead
from simmim.method.losses import L1Loss, MSELoss
from simmim.method.masks import RandomMask, UniformMask
from simmim.method.targets import HogTarget, LocallyNormalizedTarget, NormalizedTarget, PixelTarget

# Settings that all SimMIM configurations share. As there, all images train, so there is no validation loss and no
# picture; --val-images 8 holds out 8 images for both.
_SIMMIM = PretrainConfig(
    image_size=(192, 192),
    mask=RandomMask(ratio=0.6, cell=32),
    target=PixelTarget(),
    loss=L1Loss(),
    head=LinearHead(),
    batch_size=2048,
    warmup_epochs=10.0,
    weight_decay=0.05,
    betas=(0.9, 0.999),
    clip_grad=5.0,
    val_images=0,
)
_SIMMIM_800 = replace(_SIMMIM, epochs=800.0, lr=1e-4, warmup_lr=5e-7, schedule="multistep", milestones=(700.0,))
# MAE's optimiser settings, also used by FastMIM. Its 1.5e-4 is for a batch of 256. It does not clip gradients.
_MAE = PretrainConfig(
    mask=RandomMask(ratio=0.75, cell=16),
    head=TransformerHead(),
    loss=MSELoss(),
    batch_size=4096,
    epochs=800.0,
    lr=3e-4,
    warmup_lr=0.0,
    min_lr=0.0,
    weight_decay=0.05,
    betas=(0.9, 0.95),
    clip_grad=None,
    val_images=0,
)


@recipe
def demo() -> PretrainConfig:
    """A very small ViT on the embedded emoji: a first picture in minutes on two cores.

    Paper: SimMIM (arXiv 2111.09886), its method at toy size.
    Expected: hidden shapes recognisably filled in; no accuracy is claimed.
    Cost: `make demo`, which installs first, took 3 min of processor time on a 2-core Intel Xeon (2026-11-29).
    Command: simmim pretrain --recipe demo --out runs/demo
    Reproduced here: yes, by `make demo`.
    """
    return PretrainConfig(
        data="demo",
        model="vit_tiny_patch16_224",
        model_args={"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        image_size=(64, 64),
        mask=RandomMask(ratio=0.4, cell=8),
        positions="sincos",
        batch_size=16,
        epochs=10.0,
        lr=2.4e-2,
    )


@recipe
def small() -> PretrainConfig:
    """ViT-S/16 at 224 on one modest GPU, for some tens of thousands of images.

    Paper: SimMIM (arXiv 2111.09886); it has no ViT-S; 100-epoch settings at batch 256.
    Expected: no published figure.
    Cost: not measured.
    Command: simmim pretrain --recipe small --data IMAGES --out runs/small
    Less memory: --accumulate-steps 2 (or 4 …) halves (quarters …) what a step holds.
    Not reproduced here.
    """
    return PretrainConfig(
        model="vit_small_patch16_224",
        image_size=(224, 224),
        batch_size=256,
        epochs=100.0,
        lr=2e-4,
        warmup_epochs=10.0,
        warmup_lr=1e-6,
        min_lr=1e-5,
    )


@recipe
def small_data() -> PretrainConfig:
    """ViT-S/16 at 128 for a few thousand images: long in epochs, short in steps.

    Paper: SimMIM (arXiv 2111.09886) at low resolution (FastMIM, arXiv 2212.06593); the length is our choice.
    Expected: no published figure. Stop when val_loss, which predicts fine-tuning (arXiv 2206.04664), rises.
    Small data sets overfit in long runs: a run that would see each image over 4,000 times warns.
    Cost: not measured.
    Command: simmim pretrain --recipe small-data --data IMAGES --out runs/small-data
    Not reproduced here.
    """
    return PretrainConfig(
        model="vit_small_patch16_224",
        image_size=(128, 128),
        batch_size=128,
        epochs=800.0,
        lr=4e-4,
        warmup_epochs=20.0,
        warmup_lr=1e-6,
        min_lr=1e-5,
        val_images=64,
    )


@recipe
def simmim_vit_b_800ep() -> PretrainConfig:
    """SimMIM's ViT-B/16 at 224, 800 epochs of ImageNet-1K: 83.8 % after fine-tuning.

    Paper: SimMIM (arXiv 2111.09886) and its official configuration: no absolute positions but one table of relative
    biases that all blocks share, LayerScale 0.1. timm's BEiT is that model.
    Expected: ImageNet-1K top-1 83.8 after 100 epochs of fine-tuning at 224.
    Accelerator-hours: not published, not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe simmim-vit-b-800ep --data IMAGENET/train
        --out runs/vit-b
    Fewer devices: 2048 images a step are 8 × 256; add --accumulate-steps 8 for one device with 256 at a time.
    Not reproduced here; weights, losses and gradients equal the official code's (tests/torch_engine/test_reference.py).
    """
    return replace(
        _SIMMIM_800,
        model="beit_base_patch16_224",
        model_args={
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "init_values": 0.1,
        },
        image_size=(224, 224),
        drop_path=0.1,
    )


@recipe
def simmim_swin_b_100ep() -> PretrainConfig:
    """SimMIM's Swin-B at 192, 100 epochs of ImageNet-1K: 82.8 % after fine-tuning at 192.

    Paper: SimMIM (arXiv 2111.09886), the configuration of its ablations; window 6.
    Expected: ImageNet-1K top-1 82.8 after fine-tuning at 192, 83.5 at 224 (window 7).
    Accelerator-hours: not published, not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe simmim-swin-b-100ep --data IMAGENET/train
        --out runs/swin-b
    Fewer devices: 2048 images a step are 8 × 256; add --accumulate-steps 8 for one device with 256 at a time.
    Not reproduced here; weights, losses and gradients equal the official code's (tests/torch_engine/test_reference.py).
    """
    return replace(
        _SIMMIM,
        model="swin_base_patch4_window7_224",
        model_args={"window_size": 6},
        epochs=100.0,
        lr=2e-4,
        warmup_lr=1e-6,
        min_lr=1e-5,
    )


@recipe
def simmim_swin_b_800ep() -> PretrainConfig:
    """SimMIM's Swin-B at 192, 800 epochs of ImageNet-1K: 84.0 % after fine-tuning.

    Paper: SimMIM (arXiv 2111.09886); window 6.
    Expected: ImageNet-1K top-1 84.0 after fine-tuning at 224 (window 7).
    Accelerator-hours: not published, not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe simmim-swin-b-800ep --data IMAGENET/train
        --out runs/swin-b
    Fewer devices: 2048 images a step are 8 × 256; add --accumulate-steps 8 for one device with 256 at a time.
    Not reproduced here.
    """
    return replace(_SIMMIM_800, model="swin_base_patch4_window7_224", model_args={"window_size": 6})


@recipe
def simmim_swin_l_800ep() -> PretrainConfig:
    """SimMIM's Swin-L at 192, 800 epochs of ImageNet-1K: 85.4 % after fine-tuning.

    Paper: SimMIM (arXiv 2111.09886); window 12, which the last stage's 6 × 6 cells clamp to 6.
    Expected: ImageNet-1K top-1 85.4 after fine-tuning at 224 (window 14).
    Accelerator-hours: not published, not measured.
    Command: torchrun --nnodes 2 --nproc-per-node 8 -m simmim pretrain --recipe simmim-swin-l-800ep
        --data IMAGENET/train --out runs/swin-l
    Fewer devices: 2048 images a step are 16 × 128; add --accumulate-steps 16 for one device with 128 at a time.
    Not reproduced here.
    """
    return replace(_SIMMIM_800, model="swin_large_patch4_window12_384")


@recipe
def simmim_swinv2_b_800ep() -> PretrainConfig:
    """SwinV2-B at 192 with locally normalised pixels, 800 epochs of ImageNet-1K.

    Paper: Swin Transformer V2 (arXiv 2111.09883) by SimMIM, as the Swin-Transformer repository has it: window 12, each
    pixel normalised by the 47 × 47 around it.
    Expected: no figure for SwinV2-B in the SimMIM paper; its SwinV2-H reaches 85.7 at 224 and 87.1 at 512.
    Accelerator-hours: not published, not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe simmim-swinv2-b-800ep --data IMAGENET/train
        --out runs/swinv2-b
    Fewer devices: 2048 images a step are 8 × 256; add --accumulate-steps 8 for one device with 256 at a time.
    Not reproduced here.
    """
    return replace(_SIMMIM_800, model="swinv2_base_window12_192", target=LocallyNormalizedTarget(), drop_path=0.1)


@recipe
def a2mim_resnet50_300ep() -> PretrainConfig:
    """ResNet-50 at 224 after A2MIM, 300 epochs of ImageNet-1K.

    Paper: A2MIM (arXiv 2205.13943) and its configuration in OpenMixup: rate 3e-4 for a batch of 512, no clipping.
    Expected: A2MIM reports 80.4 top-1; not claimed here. Differences: the mask token replaces hidden cells after stage
    3 (A2MIM adds it) and has the common learning rate (A2MIM: a tenth), the loss lacks A2MIM's Fourier term, and crops
    are SimMIM's.
    Accelerator-hours: not published, not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe a2mim-resnet50-300ep --data IMAGENET/train
        --out runs/resnet50
    Fewer devices: 2048 images a step are 8 × 256; add --accumulate-steps 8 for one device with 256 at a time, and
    batch norms then see those 256.
    Not reproduced here.
    """
    return replace(
        _SIMMIM,
        model="resnet50",
        image_size=(224, 224),
        epochs=300.0,
        lr=3e-4,
        warmup_lr=0.0,
        min_lr=2.5e-6,  # 1e-5 at batch 2048; there it is not scaled
        clip_grad=None,
    )


@recipe
def mae_like_vit_b() -> PretrainConfig:
    """ViT-B/16 at 224 with MAE's encoder of visible patches, decoder, mask, target and optimiser; 800 epochs.

    Paper: MAE (arXiv 2111.06377), appendix A: ratio 0.75 of 16-pixel cells, pixels normalised by patch, squared error.
    Unlike MAE the encoder's positions are learned, the mask token enters before the layer that leads to the decoder's
    width, and crops are SimMIM's.
    Expected: no published figure; MAE itself has 83.6 after 1600 epochs.
    Accelerator-hours: not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe mae-like-vit-b --data IMAGENET/train
        --out runs/mae-like
    Fewer devices: 4096 images a step are 8 × 512; add --accumulate-steps 16 for one device with 256 at a time.
    Not reproduced here.
    """
    return replace(
        _MAE,
        model="vit_base_patch16_224",
        image_size=(224, 224),
        encode="visible",
        head=TransformerHead(depth=8, width=512),
        target=NormalizedTarget(),
        warmup_epochs=40.0,
    )


@recipe
def um_mae_swin_t() -> PretrainConfig:
    """Swin-T at 256 after UM-MAE: a backbone of visible cells only, a quarter of the tokens; 200 epochs.

    Paper: UM-MAE (arXiv 2205.10063) and its published command: one cell of 16 pixels visible in each 2x2, a quarter of
    these hidden too (secondary masking), pixels normalised by cell, squared error, decoder of 2 x 512, MAE's optimiser.
    Expected: UM-MAE's own Swin-T has 82.04 top-1, SimMIM's there 82.20, both after 200 epochs. Its Swin computes biases
    from the true positions of visible cells where this one has timm's table and the positions on the half image; cells
    of the secondary masking are judged here and not there; crops are SimMIM's.
    Accelerator-hours: not measured here; the authors report half of SimMIM's time.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe um-mae-swin-t --data IMAGENET/train
        --out runs/um-mae
    Fewer devices: 4096 images a step are 8 × 512; add --accumulate-steps 16 for one device with 256 at a time.
    Not reproduced here.
    """
    return replace(
        _MAE,
        model="swin_tiny_patch4_window7_224",
        model_args={"window_size": 8},
        image_size=(256, 256),
        mask=UniformMask(ratio=0.8125, cell=16),
        encode="visible",
        head=TransformerHead(width=512),
        target=NormalizedTarget(),
        epochs=200.0,
        warmup_epochs=10.0,
    )


@recipe
def fast_vit_b_128() -> PretrainConfig:
    """ViT-B/16 at 128 on gradient histograms after FastMIM: a third of the cost per step, 800 epochs.

    Paper: FastMIM (arXiv 2212.06593) and its published command: ratio 0.75 of 16-pixel cells, HOG, MAE's optimiser.
    11.3 GFLOP forward an image against 35.1 at 224.
    Expected: FastMIM's own ViT-B has 83.8 top-1 after fine-tuning at 224. Here the mask token replaces the patch
    embedding where FastMIM puts it into the pixels, the encoder has 12 heads where FastMIM's code has 6, the
    decoder 2 blocks of width 256 where FastMIM has 1, positions are learned, and crops are SimMIM's.
    Accelerator-hours: not measured here; the paper claims about 5 times faster training than earlier methods.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe fast-vit-b-128 --data IMAGENET/train
        --out runs/fast-vit-b
    Fewer devices: 4096 images a step are 8 × 512; add --accumulate-steps 8 for one device with 512 at a time.
    Not reproduced here.
    """
    return replace(_MAE, model="vit_base_patch16_224", image_size=(128, 128), target=HogTarget(), warmup_epochs=20.0)
