"""Sound files: what is read of them, against soundfile and soxr, and what is said of those that cannot be."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from simmim.config.sound import Sound
from simmim.data.augment import CentreCrop, load
from simmim.data.bad_images import BadImages
from simmim.data.evaluation import eval_images
from simmim.data.files import names_sounds
from simmim.data.labelled.classes import open_labelled
from simmim.data.picture import BadImage
from simmim.data.pipeline import Reading, train_batches
from simmim.data.readers.processes import stream_from_processes
from simmim.data.sound_augment import SoundAugment, TimeCrop, sound_augment
from simmim.data.sounds import Sounds, as_sounds, holds_sounds, open_clip
from simmim.data.sources import ImageSource, open_source, sniff
from simmim.data.statistics import measure_mean_std
from simmim.errors import UserError

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")


def write(
    path: Path, seconds: float = 1.0, *, rate: int = 16000, channels: int = 1, subtype: str | None = None
) -> Path:
    draw = np.random.default_rng(len(path.name))
    samples = draw.uniform(-0.5, 0.5, (round(seconds * rate), channels)).cumsum(axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (0.5 * samples / np.abs(samples).max()).astype(np.float32), rate, subtype=subtype)
    return path


FORMATS = {
    "wav": ("PCM_16", np.int16),
    "flac": ("PCM_16", np.int16),
    "ogg": ("VORBIS", np.int16),
    "mp3": ("MPEG_LAYER_III", np.int16),
    "aiff": ("PCM_24", np.float32),
    "caf": ("FLOAT", np.float32),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_any_format_is_read_as_soundfile_reads_it(tmp_path: Path, suffix: str, channels: int) -> None:
    subtype, dtype = FORMATS[suffix]
    path = write(tmp_path / f"a.{suffix}", channels=channels, subtype=subtype)
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    clip = open_clip(str(path))
    assert clip.dtype == dtype
    np.testing.assert_array_equal(clip.decode(channels=1, dtype=np.float32)[:, 0, 0], expected)
    part = open_clip(path.read_bytes()).cut(3000, 5000)
    np.testing.assert_allclose(part, expected[3000:8000], atol=1e-7 if suffix == "mp3" else 0)  # its decoder's rounding


def test_samples_of_16_bits_stay_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav")
    found = open_clip(str(path), 16000).decode(channels=1, dtype=np.int16)
    np.testing.assert_array_equal(found[:, 0, 0], soundfile.read(path, dtype="int16")[0])


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_a_part_of_a_sound_at_another_rate_equals_that_of_the_whole_resampled(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", 2.0, rate=rate)
    whole = soxr.resample(soundfile.read(path, dtype="float32")[0], rate, 16000)
    clip = open_clip(str(path), 16000)
    assert abs(clip.height - len(whole)) <= 1
    for first in (0, 1, 12345, 20000):
        np.testing.assert_allclose(clip.cut(first, 8000), whole[first : first + 8000], atol=2e-4)


def test_a_short_sound_ends_in_silence_and_a_long_one_is_cut_in_the_middle(tmp_path: Path) -> None:
    samples = soundfile.read(write(tmp_path / "a.wav"), dtype="int16")[0]
    clip, how = open_clip(str(tmp_path / "a.wav")), {"channels": 1, "dtype": np.int16}
    longer = load(clip, CentreCrop(size=(20000, 1)).box, size=(20000, 1), **how)[:, 0, 0]
    np.testing.assert_array_equal(longer, np.pad(samples, (0, 4000)))
    shorter = load(clip, CentreCrop(size=(10000, 1)).box, size=(10000, 1), **how)[:, 0, 0]
    np.testing.assert_array_equal(shorter, samples[3000:13000])


def reading(source: Sounds, steps: range = range(4), **others: object) -> Reading:
    bad = BadImages(None, total=len(source), max_fraction=0.9)
    return Reading(batch_size=2, seed=0, start_step=steps.start, total_steps=steps.stop, threads=2, bad_images=bad)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        write(tmp_path / "sounds" / f"{number}.flac", 1 + number / 4, rate=(16000, 22050)[number % 2])
    return tmp_path / "sounds"


def test_parts_of_sounds_come_from_their_keys_alone(folder: Path) -> None:
    source = as_sounds(open_source(str(folder)), 16000)
    how = {"crop": TimeCrop(size=(8000, 1)), "channels": 1, "dtype": sniff(source, channels=1)}
    all_steps = list(train_batches(source, reading(source), **how))
    assert all_steps[0]["image"].shape == (2, 8000, 1, 1)
    assert all_steps[0]["image"].dtype == np.int16
    resumed = list(train_batches(source, reading(source, range(2, 4)), **how))
    for late, again in zip(all_steps[2:], resumed, strict=True):
        np.testing.assert_array_equal(late["image"], again["image"])
    assert not np.array_equal(all_steps[0]["image"], all_steps[3]["image"])


@pytest.mark.slow
def test_processes_read_the_parts_that_threads_read_with_gain_and_noise(folder: Path) -> None:
    source = as_sounds(open_source(str(folder)), 16000)
    change = sound_augment(Sound(gain_db=6, noise=str(folder)))
    how = {"crop": TimeCrop(size=(8000, 1)), "channels": 1, "dtype": np.int16, "augment": change}
    threads = list(train_batches(source, reading(source), **how))
    processes = list(train_batches(source, reading(source), **how, stream=stream_from_processes))
    for left, right in zip(threads, processes, strict=True):
        np.testing.assert_array_equal(left["image"], right["image"])


def test_noise_lies_below_the_sound_by_the_level_asked_for(folder: Path) -> None:
    change = sound_augment(Sound(noise=str(folder), noise_db=(20.0, 20.0)))
    assert isinstance(change, SoundAugment)
    tone = np.sin(np.arange(8000) * 0.3).astype(np.float32)[:, None, None]
    added = change(tone, np.array([7], np.uint64)) - tone
    assert 10 * np.log10(np.mean(tone**2) / np.mean(added**2)) == pytest.approx(20, abs=0.1)


def test_gain_changes_loudness_within_its_range() -> None:
    change = sound_augment(Sound(gain_db=6))
    assert change is not None
    tone = np.full((100, 1, 1), 0.1, np.float32)
    gains = [20 * np.log10(change(tone, np.array([key], np.uint64))[0, 0, 0] / 0.1) for key in range(300)]
    assert -6 <= min(gains) < -5 and 5 < max(gains) <= 6


def test_mean_and_deviation_are_those_of_the_spectrograms(folder: Path) -> None:
    found = Sound().spectrogram((80, 64))
    source = as_sounds(open_source(str(folder)), 16000)
    mean, std = measure_mean_std(source, channels=1, dtype=np.int16, seed=0, spectrogram=found)
    crop = CentreCrop(size=(found.samples, 1))
    clips = [load(source.read(n), crop.box, size=crop.size, channels=1, dtype=np.int16).ravel() for n in range(6)]
    values = found(np, np.stack(clips)).astype(np.float64)
    assert mean == pytest.approx((values.mean(),))
    assert std == pytest.approx((values.std(),))


def names(source: ImageSource) -> list[str]:
    return [Path(source.name(index)).name for index in range(len(source))]


def test_where_there_are_pictures_sounds_are_left_out_and_audio_takes_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "songs" / "a.wav").parent
    write(folder / "more" / "c.flac")
    assert names_sounds(folder) and names(open_source(str(folder))) == ["a.wav", "c.flac"]
    (folder / "cover.png").write_bytes(b"")
    assert not names_sounds(folder) and names(open_source(str(folder))) == ["cover.png"]
    assert names(open_source(f"audio:{folder}")) == ["a.wav", "c.flac"]


@pytest.mark.parametrize("pack", ["zip", "tar"])
def test_archives_choose_likewise(tmp_path: Path, pack: str) -> None:
    write(tmp_path / "songs" / "a.wav")
    for expected in (["a.wav"], ["cover.png"]):
        file = shutil.make_archive(str(tmp_path / "songs"), pack, tmp_path / "songs")
        assert names(open_source(file)) == expected and names_sounds(file) == (expected == ["a.wav"])
        (tmp_path / "songs" / "cover.png").write_bytes(b"")


def test_class_folders_choose_likewise(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for number in range(4):
            write(tmp_path / name / f"{number}.wav")
    assert len(open_labelled(str(tmp_path)).train) + len(open_labelled(str(tmp_path)).val) == 8
    (tmp_path / "one" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"class folder .*two holds no images"):
        open_labelled(str(tmp_path))


def test_a_list_of_both_kinds_is_told_in_one_line(folder: Path) -> None:
    (folder / "list.txt").write_text("1.flac\n2.png\n")
    with pytest.raises(
        UserError, match=r"holds sounds, such as .*1\.flac, and others, such as .*2\.png; give files of one"
    ):
        holds_sounds(open_source(str(folder / "list.txt")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"RIFF0000WAVEbroken", "cannot be read as a sound: .+"),
        (b"\xff\xd8 a picture", "cannot be read as a sound: .+"),
    ],
)
def test_a_broken_file_is_named_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    for raw in (content, str(path)):
        with pytest.raises(BadImage, match=f"^{reason}$"):
            open_clip(raw)


def test_a_broken_sound_is_listed_and_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "2.flac").write_bytes(b"fLaC broken")
    source = as_sounds(open_source(str(folder)), 16000)
    bad = BadImages(tmp_path / "bad_images.txt", total=len(source), max_fraction=0.5)
    samples = eval_images(source, range(6), size=(800, 1), channels=1, dtype=np.int16, bad_images=bad)
    assert samples.shape == (5, 800, 1, 1)
    (line,) = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert line.startswith(f"{folder / '2.flac'}\tcannot be read as a sound: ")


def test_a_sound_without_samples_and_one_that_is_not_finite_are_bad(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(BadImage, match="holds no samples"):
        open_clip(str(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "b.wav", np.array([0, np.nan], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(BadImage, match="not finite"):
        open_clip(str(tmp_path / "b.wav")).cut(0, 2)


def test_a_name_that_is_no_utf8_is_read(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    write(tmp_path / "a.wav").rename(path)
    assert open_clip(open_source(str(tmp_path)).name(0)).height == 16000


def test_a_sound_that_does_not_say_its_length_is_bad(tmp_path: Path) -> None:
    header = bytearray(write(tmp_path / "a.flac").read_bytes())
    header[21] &= 0xF0  # the lower four bits of this byte and the next four bytes count the samples
    header[22:26] = bytes(4)
    with pytest.raises(BadImage, match=r"does not say how long it is; write it again, as by ffmpeg"):
        open_clip(bytes(header))


@pytest.mark.parametrize("content", ["[1]", '{"names": 5}', '{"names": [5]}', "{}", "no JSON"])
def test_annotations_beside_sounds_are_no_index_of_packed_ones(tmp_path: Path, content: str) -> None:
    write(tmp_path / "00000.wav")
    (tmp_path / "00000.json").write_text(content)
    assert names_sounds(tmp_path)
    (tmp_path / "pack.json").write_text("{}")
    assert not names_sounds(tmp_path)


def test_sounds_without_the_extra_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simmim.data import sounds

    write(tmp_path / "a.wav")
    sounds._library.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    with pytest.raises(UserError, match=r"sounds need soxr, which is not here .+; pip install 'simmim\[audio\]'"):
        as_sounds(open_source(str(tmp_path)), 16000)
    sounds._library.cache_clear()


def test_a_list_with_audio_before_it_is_of_sounds_whatever_their_names(folder: Path) -> None:
    (folder / "0.flac").rename(folder / "first")
    (folder / "list.txt").write_text("first\n1.flac\n")
    source = open_source(f"audio:{folder / 'list.txt'}")
    assert holds_sounds(source) and len(source) == 2
    assert open_clip(source.read(0).raw()).height == 16000
