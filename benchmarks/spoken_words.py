"""Spoken words in noise, made by espeak-ng: two sets of other words and other voices.

    apt-get install espeak-ng

A set has clips of 1 s at 16 kHz: 20 words, spoken by voices of English in six accents, at random speed, pitch, loudness
and place, with noise of random colour 0 to 20 dB below the word. The voices of the test clips are in no training clip,
and the two sets share neither words nor voices: choose on `dev`, prove on `test`. Each clip has its own random numbers
from the set's seed, so that a set is the same wherever the same espeak-ng makes it; `fingerprint` tells.
"""

import hashlib
import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

RATE = 16000
FEW = 25
"""Labelled training clips of a word."""
CLIPS = {"train": 200, "test": 50}
"""Clips of a word."""
WORDS = {
    "test": "yes no up down left right on off stop go zero one two three four five six seven eight nine",
    "dev": """
        bed bird cat dog happy house tree visual follow learn red green blue open close water paper garden late run
    """,
}
_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbclan")
_NAMES = """
Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen Storm
Tweaky adam anika antonio aunty belinda benjamin boris caleb david ed edward f1 f2 f3 f4 f5 gustave iven john
kaukovalta klatt linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max miguel norbert pablo paul pedro quincy rob robert
sandro shelby steph travis victor zac
"""
"""Voice variants of espeak-ng, without whispers, robots and second versions of one."""
_SPEAKERS = _NAMES.split()
_SPEAKERS_OF = {
    ("test", "train"): (0, 20),
    ("test", "test"): (20, 30),
    ("dev", "train"): (30, 50),
    ("dev", "test"): (50, 60),
}
_SILENCE = 0.01  # of the loudest sample: what is below it at both ends is cut off


def speakers(name: str, part: str) -> list[str]:
    """Return the voices of a part of a set; no two parts share one."""
    order = np.random.default_rng(0).permutation(len(_SPEAKERS))
    return [_SPEAKERS[number] for number in order[slice(*_SPEAKERS_OF[name, part])]]


def make_set(name: str, folder: Path) -> Path:
    """Make a set, unless it is there: folder/NAME/train/WORD/*.wav and folder/NAME/test/WORD/*.wav."""
    made = folder / name
    if made.exists():
        return made
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng speaks the words and is not installed; use apt-get install espeak-ng")
    aside = folder / f"{name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    for number, part in enumerate(CLIPS):
        voices = speakers(name, part)
        for place, word in enumerate(WORDS[name].split()):
            (aside / part / word).mkdir(parents=True)
            for clip in range(CLIPS[part]):
                draw = np.random.default_rng([list(WORDS).index(name), number, place, clip])
                samples = _in_noise(_say(word, voices, draw), draw)
                soundfile.write(aside / part / word / f"{clip:04}.wav", samples, RATE, subtype="PCM_16")
    return aside.rename(made)


def few_labels(made: Path, seed: int) -> Path:
    """Link `FEW` training clips of each word, drawn by a seed, and all test clips: few-SEED/train and few-SEED/val."""
    few = made / f"few-{seed}"
    if few.exists():
        return few
    aside = made / f"few-{seed}.part"
    shutil.rmtree(aside, ignore_errors=True)
    for part, into in (("train", "train"), ("test", "val")):
        for number, word in enumerate(sorted(path.name for path in (made / part).iterdir())):
            (aside / into / word).mkdir(parents=True)
            clips = sorted((made / part / word).iterdir())
            order = np.random.default_rng([seed, number]).permutation(len(clips))
            for clip in order[: FEW if part == "train" else len(clips)]:
                os.link(clips[clip], aside / into / word / clips[clip].name)
    return aside.rename(few)


def fingerprint(made: Path) -> str:
    """Return a hash of all clips of a set."""
    found = hashlib.sha256()
    for path in sorted((*(made / "train").rglob("*.wav"), *(made / "test").rglob("*.wav"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _say(word: str, voices: list[str], draw: np.random.Generator) -> NDArray[np.float64]:
    """Speak a word by a random voice, of loudest sample 1, without the silence around it."""
    voice = f"{draw.choice(_ACCENTS)}+{draw.choice(voices)}"
    speed, pitch = str(draw.integers(120, 221)), str(draw.integers(20, 81))
    command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "--stdout", word]
    spoken = subprocess.run(command, capture_output=True, check=True)
    samples, rate = soundfile.read(io.BytesIO(spoken.stdout))
    samples = soxr.resample(samples, rate, RATE)
    samples /= np.abs(samples).max()
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    return samples[loud[0] : loud[-1] + 1]


def _in_noise(word: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    """Put a word within 0.1 s of the middle of 1 s of noise, and change the loudness of both together."""
    word = word[:RATE]
    start = (RATE - len(word)) / 2 + draw.uniform(-0.1, 0.1) * RATE
    start = int(np.clip(start, 0, RATE - len(word)))
    spectrum = np.fft.rfft(draw.standard_normal(RATE))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20.0) ** (draw.uniform(0, 2) / 2)  # white to brown; flat to 20 Hz
    noise = np.fft.irfft(spectrum, RATE)
    power = np.mean(word**2) / 10 ** (draw.uniform(0, 20) / 10)
    mixed = noise * np.sqrt(power / np.mean(noise**2))
    mixed[start : start + len(word)] += word
    return mixed / np.abs(mixed).max() * 10 ** (draw.uniform(-18, -1) / 20)
