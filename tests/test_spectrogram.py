"""Log-mel spectrograms, against Kaldi's own code (kaldi-native-fbank) and by ear's logic."""

from typing import Any

import numpy as np
import pytest
import torch

from simmim.config.sound import Sound
from simmim.errors import UserError
from simmim.method.griffin_lim import hear
from simmim.method.spectrogram import Spectrogram
from simmim.torch_engine.models.front_end import FrontEnd


def by_kaldi(sound: Sound, bands: int, samples: np.ndarray) -> np.ndarray:
    """Log-mel energies (T, M) with AudioMAE's options: Hann window, no dither, no energy."""
    kaldi = pytest.importorskip("kaldi_native_fbank")
    options = kaldi.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.frame_opts.samp_freq = sound.rate
    options.frame_opts.frame_length_ms = sound.window_ms
    options.frame_opts.frame_shift_ms = sound.hop_ms
    options.mel_opts.num_bins = bands
    options.mel_opts.low_freq = sound.low_hz
    options.mel_opts.high_freq = sound.high_hz
    options.use_energy, options.htk_compat, options.energy_floor = False, True, 0
    bank = kaldi.OnlineFbank(options)
    bank.accept_waveform(sound.rate, samples.tolist())
    bank.input_finished()
    return np.array([bank.get_frame(number) for number in range(bank.num_frames_ready)])


def noise(found: Spectrogram) -> np.ndarray:
    """Noise that swells, with an offset: (samples,)."""
    swell = np.linspace(0, 1, found.samples) ** 3
    return ((np.random.default_rng(0).standard_normal(found.samples) * 0.1 + 0.05) * swell).astype(np.float32)


# Kaldi refuses bands without a frequency of the transform, as one of AudioMAE's 128 from 20 Hz is: hence 60 Hz.
@pytest.mark.parametrize(
    ("settings", "bands"),
    [
        ({"low_hz": 60.0}, 128),
        ({}, 80),
        ({"rate": 22050, "window_ms": 32.0, "hop_ms": 8.0}, 64),
        ({"rate": 8000, "high_hz": 3700.0}, 40),
    ],
)
def test_the_front_end_equals_kaldis_filter_banks(settings: dict[str, Any], bands: int) -> None:
    sound = Sound(**settings)
    found = sound.spectrogram((200, bands))
    samples = noise(found)
    expected = by_kaldi(sound, bands, samples)
    assert expected.shape == (200, bands)
    np.testing.assert_allclose(FrontEnd(found)(torch.from_numpy(samples[None]))[0, 0], expected, atol=1e-3)
    np.testing.assert_allclose(found(np, samples[None])[0], expected, atol=1e-3)


def test_samples_of_16_bits_are_taken_as_shares_of_the_loudest() -> None:
    found = Sound().spectrogram((32, 80))
    samples = np.rint(noise(found) * 32768).astype(np.int16)
    front = FrontEnd(found)
    same = front(torch.from_numpy(samples.astype(np.float32)[None] / 32768))
    assert torch.equal(front(torch.from_numpy(samples[None, :, None, None])), same)


def test_the_front_end_is_computed_in_fp32_under_autocast() -> None:
    front = FrontEnd(Sound().spectrogram((32, 80)))
    samples = torch.from_numpy(noise(front.spectrogram)[None])
    with torch.autocast("cpu", torch.bfloat16):
        found = front(samples)
    assert found.dtype == torch.float32
    assert torch.equal(found, front(samples))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"hop_ms": 50.0}, "a hop of 800 samples is not within 2 and the window of 400"),
        ({"high_hz": 9000.0}, "mel bands from 20 to 9000 Hz are not within 0 and half the rate 16000"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Sound(**settings).spectrogram((128, 128))


def test_griffin_lim_makes_a_sound_with_the_spectrogram_that_it_is_given() -> None:
    found = Sound().spectrogram((128, 128))
    time = np.arange(found.samples) / found.rate
    chirp = (0.2 * np.sin(2 * np.pi * (300 + 600 * time) * time)).astype(np.float32)
    wanted = found(np, chirp[None])[0]
    heard = found(np, hear(found, wanted)[None])[0]
    loud = wanted > wanted.max() - 4
    assert np.abs(heard - wanted)[loud].mean() < 0.5
    silence = found(np, np.zeros((1, found.samples), np.float32))[0]
    assert np.abs(silence - wanted)[loud].mean() > 8
