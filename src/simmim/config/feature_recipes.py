"""Recipes for features that are good as they are: descriptors, teachers, clusters and views."""

from dataclasses import replace

from simmim.config.pretraining import PretrainConfig
from simmim.config.recipe_registry import recipe
from simmim.method.heads import LinearHead, TransformerHead
from simmim.method.masks import BlockMask, InverseBlockMask, RandomMask
from simmim.method.objectives import (
    DescriptorRegression,
    EmaTeacher,
    FrozenTeacher,
    LatentClusters,
    PixelReconstruction,
    SigReg,
)

_DESCRIPTOR = PretrainConfig(
    image_size=(128, 128),
    objectives=(DescriptorRegression(),),
    batch_size=32,
    epochs=100.0,
    clip_grad=3.0,
    val_images=0,
)


@recipe
def default_small() -> PretrainConfig:
    """ViT-S/16 at 128 for 1,000 to 100,000 images and one GPU: useful frozen features in little time.

    Paper: none; a descriptor of the whole image, predicted from half of its patches (docs/objectives.md).
    Expected: k-NN on 8 classes of 828 emoji 0.572 (raw pixels 0.434, untrained 0.394), fine-tuned 0.603 (from scratch
    0.415); k-NN on 9 classes of 564 cut-outs 0.328 (0.208, 0.191); on 60 classes of crops of photographs 0.560 after 10
    passes (0.197, 0.409); one seed each. A ViT of width 128 at 32 pixels was above raw pixels, the untrained encoder
    and training from scratch on four sets (docs/objectives.md).
    Cost: of those emoji, 100 passes, about an hour of one CPU core; 10 passes over 6,000 images, about 35 minutes.
    Command: simmim pretrain --recipe default-small --data IMAGES --out runs/small
    Smaller images: --image-size 32 --model-args patch_size=4.
    Reproduced here over all its steps on the emoji and the cut-outs, with one seed.
    """
    return replace(
        _DESCRIPTOR,
        model="vit_small_patch16_224",
        mask=RandomMask(ratio=0.5),
        encode="visible",
        positions="sincos",
    )


@recipe
def default_small_resnet() -> PretrainConfig:
    """ResNet-18 at 128, as default-small but of whole images.

    Paper: none; a descriptor of the whole image (docs/objectives.md).
    Expected: no figure at this size. Frozen features of a ResNet-18 of half width at 64 pixels were above raw pixels
    and the untrained encoder on four sets; fine-tuning was 5 points above training from scratch on one of the three
    sets that the recipe was not chosen on (docs/objectives.md).
    Cost: not measured.
    Command: simmim pretrain --recipe default-small-resnet --data IMAGES --out runs/small
    Not reproduced here at this size.
    """
    return replace(
        _DESCRIPTOR,
        model="resnet18",
        objectives=(DescriptorRegression(see="whole"),),
    )


@recipe
def data2vec2_vit_b() -> PretrainConfig:
    """ViT-B/16 at 224 after data2vec 2.0: the average of its own top 10 blocks, 16 masks an image.

    Paper: data2vec 2.0 (arXiv 2212.07525): 16 masks an image, inverse blocks, the top 10 blocks of an average. Batch
    and rates are ours. Differences: a transformer head of 2 blocks where the paper has convolutions, outputs of
    blocks where it averages those of their MLPs, no loss on the class token, and pixels beside it at a tenth.
    Expected: the paper reports 86.8 top-1 of ImageNet-1K for a ViT-L after 150 epochs and fine-tuning; none is claimed
    here.
    Accelerator-hours: not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe data2vec2-vit-b --data IMAGENET/train
        --out runs/data2vec2
    Fewer devices: 512 images a step, with 16 masks each; add --accumulate-steps 16 for one device.
    Not reproduced here.
    """
    return PretrainConfig(
        model="vit_base_patch16_224",
        image_size=(224, 224),
        mask=InverseBlockMask(ratio=0.8, cell=16),
        masks_per_image=16,
        objectives=(
            EmaTeacher(top=10, momentum=0.9998, momentum_end=0.99999, momentum_steps=100_000),
            PixelReconstruction(weight=0.1),
        ),
        encode="visible",
        head=TransformerHead(),
        batch_size=512,
        epochs=200.0,
        lr=1e-3,
        warmup_lr=0.0,
        min_lr=0.0,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        val_images=0,
    )


@recipe
def capi_vit_b() -> PretrainConfig:
    """ViT-B/16 at 224 after CAPI, scaled for one GPU: clusters of its own patch features.

    Paper: CAPI (arXiv 2502.08769), which trains a ViT-L/14 on far larger batches, with 16,384 prototypes and a
    cross-attention predictor. Here: batch 256, 1,024 prototypes, 65 % inverse blocks, a transformer head.
    Expected: the paper's ViT-L has 83.8 top-1 of ImageNet-1K by linear probes; none is claimed here.
    Accelerator-hours: not measured.
    Command: simmim pretrain --recipe capi-vit-b --data IMAGES --out runs/capi
    Less memory: --accumulate-steps 2 (or 4 …), and clusters are then balanced over each piece of a batch.
    Not reproduced here.
    """
    return PretrainConfig(
        model="vit_base_patch16_224",
        image_size=(224, 224),
        mask=InverseBlockMask(ratio=0.65, cell=16),
        objectives=(LatentClusters(),),
        encode="visible",
        head=TransformerHead(),
        batch_size=256,
        epochs=200.0,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        val_images=0,
    )


@recipe
def maskdistill_vit_b() -> PretrainConfig:
    """ViT-B/16 at 224 after MaskDistill: the features of a trained teacher at masked patches, 300 epochs.

    Paper: MaskDistill (arXiv 2210.10615): a CLIP ViT-B/16 as teacher, block masks at ratio 0.4, smooth L1. Give a
    teacher: --teacher timm:NAME, a run or a file.
    Expected: the paper reports 88.3 top-1 of ImageNet-1K for a ViT-H after fine-tuning; none is claimed here.
    Accelerator-hours: not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe maskdistill-vit-b --teacher RUN
        --data IMAGENET/train --out runs/maskdistill
    Fewer devices: 2048 images a step are 8 × 256; add --accumulate-steps 8 for one device with 256 at a time.
    Not reproduced here.
    """
    return PretrainConfig(
        model="vit_base_patch16_224",
        image_size=(224, 224),
        mask=BlockMask(ratio=0.4, cell=16),
        objectives=(FrozenTeacher(),),
        head=LinearHead(),
        batch_size=2048,
        epochs=300.0,
        lr=3.75e-4,  # 1.5e-3 at batch 2048
        warmup_epochs=10.0,
        betas=(0.9, 0.98),
        clip_grad=3.0,
        drop_path=0.1,
        val_images=0,
    )


@recipe
def lejepa_resnet50() -> PretrainConfig:
    """ResNet-50 at 224 after LeJEPA: views agree, features are Gaussian; no teacher, no negatives.

    Paper: LeJEPA (arXiv 2511.08544): two global views, small local views, λ 0.05, 1,024 slices, AdamW.
    Expected: the paper reports 79 top-1 of ImageNet-1K by a linear probe for a ViT-H/14; none is claimed here.
    Accelerator-hours: not measured.
    Command: simmim pretrain --recipe lejepa-resnet50 --data IMAGES --out runs/lejepa
    Less memory: --accumulate-steps 2 (or 4 …), and features are then compared within each piece of a batch.
    Not reproduced here.
    """
    return PretrainConfig(
        model="resnet50",
        image_size=(224, 224),
        objectives=(SigReg(local_views=6, slices=1024),),
        crop_scale=(0.999, 1.0),
        batch_size=256,
        epochs=100.0,
        lr=1e-3,
        weight_decay=0.05,
        val_images=0,
    )
