"""Recipes for sounds: a descriptor of the spectrogram, and masked spectrograms after AudioMAE."""

from dataclasses import replace

from simmim.config.pretraining import PretrainConfig
from simmim.config.recipe_registry import recipe
from simmim.config.sound import SPECTROGRAM
from simmim.method.heads import TransformerHead
from simmim.method.losses import MSELoss
from simmim.method.masks import RandomMask
from simmim.method.objectives import DescriptorRegression
from simmim.method.targets import NormalizedTarget

# AudioMAE's settings, but for the length and the rate.
_AUDIO_MAE = PretrainConfig(
    input="sounds",
    image_size=SPECTROGRAM,
    channels=1,
    flip="none",
    mask=RandomMask(ratio=0.8, cell=16),
    encode="visible",
    target=NormalizedTarget(),
    loss=MSELoss(),
    warmup_lr=0.0,
    min_lr=0.0,
    betas=(0.9, 0.95),
    clip_grad=None,
)


@recipe
def audio_small() -> PretrainConfig:
    """ViT-S/16 on spectrograms of 10 s: useful features of some thousand sounds in little time.

    Paper: none; a descriptor of the whole spectrogram, predicted from all of it (docs/sound.md).
    Expected: no figure at this size. On 20 spoken words in noise, 1 s each, a ViT of width 128 gave 0.58 by k-NN where
    the raw spectrogram gave 0.26 and an untrained encoder 0.07, and 0.65 fine-tuned where training from scratch gave
    0.12, and 0.30 in three times the steps (docs/sound.md).
    Cost: not measured. Short sounds: --image-size 128x128 is 1.3 s, an eighth of the work.
    Command: simmim pretrain --recipe audio-small --data SOUNDS --out runs/sounds (or without it, for sounds)
    Not reproduced here at this size.
    """
    descriptor = DescriptorRegression(see="whole", shape_values=32, colour_scale=1.0, texture_scale=0.0)
    return PretrainConfig(
        input="sounds",
        model="vit_small_patch16_224",
        image_size=SPECTROGRAM,
        channels=1,
        flip="none",
        positions="sincos",
        objectives=(descriptor,),  # chosen on other words and voices (benchmarks/results/words_search.md)
        batch_size=32,
        epochs=100.0,
        clip_grad=3.0,
        val_images=0,
    )


@recipe
def audio_small_pixels() -> PretrainConfig:
    """ViT-S/16 on spectrograms of 10 s by masked patches, to be fine-tuned or to fill in what is hidden.

    Paper: AudioMAE (arXiv 2207.06405) at the size of a ViT-S; the head, the rate and the length are our choice.
    Expected: no published figure. In little time features are hardly better than an untrained encoder's
    (docs/sound.md).
    Cost: not measured. Short sounds: --image-size 128x128 is 1.3 s, an eighth of the work.
    Command: simmim pretrain --recipe audio-small-pixels --data SOUNDS --out runs/sounds
    Not reproduced here.
    """
    return replace(
        _AUDIO_MAE,
        model="vit_small_patch16_224",
        positions="sincos",
        head=TransformerHead(depth=2, width=256),
        batch_size=32,
        epochs=100.0,
        weight_decay=0.05,
        clip_grad=3.0,
    )


@recipe
def audiomae_vit_b() -> PretrainConfig:
    """ViT-B/16 on 10 s of sound after AudioMAE: 32 epochs of AudioSet, four fifths hidden.

    Paper: AudioMAE (arXiv 2207.06405), appendix, and the authors' command: 128 mel bands of 16 kHz, 25 ms Hann windows
    every 10 ms, 1024 frames, patches of 16 x 16, ratio 0.8 at random, patches normalised, squared error on hidden ones,
    batch 512, 33 epochs of which 3 warm up (the paper: 32), rate 2e-4 for a batch of 256, AdamW with betas 0.9 and 0.95
    and decay 1e-4, mean -4.2677 and deviation 4.5690 of AudioSet, of which the code divides by twice.
    Differences: the decoder has 8 blocks of width 512 with attention to all cells where AudioMAE has 16 in shifted
    windows; encoder positions are learned, from sines and cosines, where AudioMAE's stay fixed; the mask token enters
    before the layer that leads to the decoder's width; a sound that is longer than 10.3 s is cut at random where
    AudioMAE rolls it in time and changes its loudness; a shorter one is filled with silence where AudioMAE fills the
    spectrogram with zeros.
    Expected: AudioMAE reports mAP 47.3 on AudioSet-2M after fine-tuning; none is claimed here.
    Accelerator-hours: not measured.
    Command: torchrun --nproc-per-node 8 -m simmim pretrain --recipe audiomae-vit-b --data AUDIOSET --out runs/audiomae
    Fewer devices: 512 sounds a step are 8 × 64; add --accumulate-steps 8 for one device with 64 at a time. For other
    data leave out AudioSet's numbers: --mean measure --std measure.
    Not reproduced here; the loss equals a plain implementation (tests/torch_engine/test_sound.py).
    """
    return replace(
        _AUDIO_MAE,
        model="vit_base_patch16_224",
        positions="sincos",
        head=TransformerHead(depth=8, width=512),
        mean=(-4.2677393,),
        std=(2 * 4.5689974,),
        batch_size=512,
        epochs=33.0,
        warmup_epochs=3.0,
        lr=4e-4,
        weight_decay=1e-4,
        val_images=0,
    )
