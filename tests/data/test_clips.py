"""Clips as sources of images: every frame is the one that a decoding from the beginning gives."""

import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest

pytest.importorskip("av")

import av
from clip_files import HEIGHT, WIDTH, decode_whole, picture, write_clip

from simmim.cli import main
from simmim.config.frames import FrameChoice
from simmim.config.pretraining import PretrainConfig
from simmim.config.validation import from_settings
from simmim.data.archives import ArchiveImages
from simmim.data.decode import decode
from simmim.data.files import PathList, names_sounds
from simmim.data.labelled.classes import open_labelled
from simmim.data.labelled.every import open_with_labels
from simmim.data.picture import BadImage
from simmim.data.sources import open_files, open_source, read_raw, sniff
from simmim.data.video import decoder
from simmim.data.video.notes import describe_frames, warn_of_clips
from simmim.data.video.source import Clips, clips_of
from simmim.data.windows import Windows
from simmim.errors import UserError

X264 = "log=-1:scenecut=0:keyint=10:bframes=3:b-pyramid=normal"
JITTERED = [40 * number + number % 7 for number in range(40)]  # ms
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "B-frames": ("a.mp4", {"options": {"bf": "3"}}),
    "open GOPs": ("a.mkv", {"options": {"x264-params": f"{X264}:open-gop=1"}}),
    "open GOPs in a stream": ("a.m2ts", {"options": {"x264-params": f"{X264}:open-gop=1"}}),
    "intra refresh": ("a.mp4", {"options": {"x264-params": f"{X264}:intra-refresh=1"}}),
    "a GOP of three": ("a.mp4", {"options": {"x264-params": "log=-1:keyint=3:bframes=2:b-adapt=0:scenecut=0"}}),
    "a variable rate": ("a.mkv", {"times": JITTERED, "base": Fraction(1, 1000)}),
    "a late start": ("a.mp4", {"times": range(1000, 1040)}),
    "fragments": ("a.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "HEVC of 10 bits": ("a.mp4", {"codec": "libx265", "form": "yuv420p10le"}),
    "VP9 of odd sides": ("a.webm", {"codec": "libvpx-vp9", "pictures": [picture(n, 47, 63) for n in range(20)]}),
    "AV1": (
        "a.mkv",
        {"codec": "libsvtav1", "options": {"preset": "12"}, "pictures": [picture(n, 64, 64) for n in range(20)]},
    ),
    "MPEG-2": ("a.mpg", {"codec": "mpeg2video", "options": {"bf": "2"}}),
    "AVI without time stamps": ("a.avi", {"options": {"bf": "3"}}),
    "a bare stream": ("a.h264", {"options": {"bf": "2"}}),
}
FAST = (
    "B-frames",
    "open GOPs",
    "intra refresh",
    "a variable rate",
    "AVI without time stamps",
)


def clips(*paths: Path, frames: str = "1") -> Clips:
    return Clips(PathList([str(path) for path in paths]), FrameChoice.parse(frames))


def numbers(source: Any) -> list[int]:
    return [int(source.name(index).rpartition("#")[2]) for index in range(len(source))]


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_any_frame_in_any_order_is_that_of_a_decoding_from_the_beginning(kind: str, tmp_path: Path) -> None:
    name, options = KINDS[kind]
    path = write_clip(tmp_path / name, **options)
    whole, source = decode_whole(path), clips(path)
    assert len(source) == len(whole) >= 20
    if len(source._keys[0]):  # its packets have time stamps
        assert source._stamps.tolist() == [time for time, _ in whole]
    for index in [*np.random.default_rng(0).permutation(len(source)).tolist(), *range(len(source))]:
        np.testing.assert_array_equal(source.read(index), whole[index][1])


def test_a_hidden_frame_of_vp8_is_no_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.webm", "libvpx", frames=12)
    with av.open(str(path)) as file:
        packet = bytes([packet for packet in file.demux(video=0) if packet.size][5])
    raw = path.read_bytes()
    assert raw.count(packet) == 1 and packet[0] & 16
    path.write_bytes(raw.replace(packet, bytes([packet[0] & ~16]) + packet[1:]))  # its bit that it is shown
    whole, source = decode_whole(path), clips(path)
    assert len(source) == len(whole) == 11
    for index in range(11):
        np.testing.assert_array_equal(source.read(index), whole[index][1])


def test_frames_are_named_by_clip_and_number(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=25)
    source = open_source(str(tmp_path), "12")
    assert [source.name(index) for index in range(3)] == [f"{path}#000000", f"{path}#000012", f"{path}#000024"]


def test_one_frame_a_second_is_the_first_of_each_second_that_has_one(tmp_path: Path) -> None:
    seconds = [0.0, 0.4, 0.9, 1.1, 1.9, 2.0, 5.2, 5.9, 6.1]
    times = [round(1000 * second) + 7000 for second in seconds]
    path = write_clip(tmp_path / "a.mkv", frames=9, times=times, base=Fraction(1, 1000))
    assert numbers(clips(path, frames="1s")) == [0, 3, 5, 6, 8]
    assert numbers(clips(path, frames="2.5s")) == [0, 6]


def test_key_frames_alone_are_taken(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=30, options={"x264-params": "log=-1:keyint=12:scenecut=0"})
    assert numbers(clips(path, frames="key")) == [0, 12, 24]


def test_frames_that_hardly_differ_are_dropped_and_a_small_change_is_seen(tmp_path: Path) -> None:
    rng, still = np.random.default_rng(0), picture(0)
    changed = still.copy()
    changed[8:16, 8:16] = 255 - changed[8:16, 8:16]
    shown = [still] * 6 + [changed] * 6 + [picture(20)] * 6
    noisy = [np.clip(each + rng.normal(0, 3, each.shape), 0, 255).astype(np.uint8) for each in shown]
    path = write_clip(tmp_path / "a.mkv", "ffv1", pictures=noisy, form="bgr0")
    assert numbers(clips(path, frames="1+distinct")) == [0, 6, 12]
    assert numbers(clips(path, frames="1+distinct=250")) == [0]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_are_turned_upright(degrees: int, mirrored: bool, tmp_path: Path) -> None:
    def turn(stream: Any) -> None:
        stream.set_display_rotation(degrees, hflip=mirrored)

    path = write_clip(tmp_path / "a.mp4", frames=2, prepare=turn)
    expected = np.rot90(decode_whole(path)[1][1], degrees // 90)
    np.testing.assert_array_equal(clips(path).read(1), expected[:, ::-1] if mirrored else expected)


def test_archives_of_pictures_win_over_a_clip_beside_them(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=2)
    with ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"")
    assert isinstance(open_source(str(tmp_path)), ArchiveImages)


def test_every_clip_is_looked_at_before_the_depth_is_chosen(tmp_path: Path) -> None:
    shallow = write_clip(tmp_path / "a.mkv", "ffv1", form="gray", frames=40)
    deep = write_clip(tmp_path / "b.mkv", "ffv1", form="gray16le", frames=2)
    source = open_files([str(shallow), str(deep)], "1")
    assert len(source) == 42
    assert sniff(source, channels=1) == np.float32


def test_grey_stays_grey_and_keeps_its_depth(tmp_path: Path) -> None:
    shallow, deep = (
        clips(write_clip(tmp_path / f"{form}.mkv", "ffv1", frames=2, form=form)).read(0)
        for form in ("gray", "gray16le")
    )
    assert isinstance(shallow, np.ndarray) and (shallow.shape, shallow.dtype) == ((HEIGHT, WIDTH), np.uint8)
    assert isinstance(deep, np.ndarray) and (deep.shape, deep.dtype) == ((HEIGHT, WIDTH), np.uint16)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "bgra"
        frame = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 4), np.uint8), format="rgba").reformat(
            format="bgra"
        )
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert (decode(clips(path).read(0), channels=3, dtype=np.uint8) == 255).all()


def test_threads_and_copies_read_the_same_and_few_files_stay_open(tmp_path: Path) -> None:
    paths = [write_clip(tmp_path / f"{name}.mp4", frames=12) for name in "abcdefgh"]
    source = clips(*paths)
    alone = [np.asarray(source.read(index)) for index in range(len(source))]
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for index, found in zip(order, pool.map(copy.read, order), strict=True):
            np.testing.assert_array_equal(found, alone[index])
    if sys.platform == "linux":
        opened = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
        assert 0 < sum(str(tmp_path) in name for name in opened) <= 2 * 4  # of two sources


def test_a_closed_decoder_is_freed_at_once(tmp_path: Path) -> None:
    """A cycle would keep its tens of megabytes until a collection."""
    import gc
    import weakref

    path = write_clip(tmp_path / "a.mp4", frames=12)
    opened = decoder.Decoder(str(path))
    opened.read(0, np.array([0]))
    watch = weakref.ref(opened)
    gc.disable()
    try:
        opened.close()
        del opened
        assert watch() is None
    finally:
        gc.enable()


def damage(path: Path) -> None:
    """Overwrite a packet in the middle of a clip."""
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        place, size = packets[len(packets) // 2].pos, packets[len(packets) // 2].size
    with path.open("r+b") as file:
        file.seek(place + 8)
        file.write(np.random.default_rng(0).bytes(size - 8))


def test_a_damaged_packet_spoils_frames_up_to_the_next_key_frame(tmp_path: Path) -> None:
    options = {"x264-params": "log=-1:keyint=10:scenecut=0:bframes=0"}
    path = write_clip(tmp_path / "a.mp4", pictures=[picture(n, 192, 256) for n in range(40)], options=options)
    whole = decode_whole(path)
    damage(path)  # frame 20, a key frame
    source, bad = clips(path), []
    for index in range(40):
        try:
            np.testing.assert_array_equal(read_raw(source, index), whole[index][1])
        except BadImage:
            bad.append(index)
    assert bad == list(range(20, 30))


def test_a_clip_that_was_cut_off_gives_the_frames_that_it_has(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", pictures=[picture(n, 192, 256) for n in range(40)])
    whole = decode_whole(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    source = clips(path)
    assert 10 < len(source) < 40
    np.testing.assert_array_equal(source.read(10), whole[10][1])


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello " * 1000, "cannot be decoded: Invalid data found when processing input"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\nb.mp4\n#EXT-X-ENDLIST\n", "cannot be decoded: Invalid data"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_clip_counts_as_one_bad_image_that_is_named(kind: str, tmp_path: Path) -> None:
    write_clip(tmp_path / "b.mp4", frames=3)
    (tmp_path / "a.mp4").write_bytes(BROKEN[kind][0])
    source = open_source(str(tmp_path), "1")
    assert len(source) == 4 and source.name(0) == str(tmp_path / "a.mp4")
    with pytest.raises(BadImage, match=BROKEN[kind][1]):
        source.read(0)
    assert (warn_of_clips(source) or "").startswith(f"1 of 2 clips cannot be read, such as {tmp_path / 'a.mp4'}: ")


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def test_clips_of_which_none_can_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"^none of 1 clips can be read, such as .*a\.mp4: holds no video; give other"):
        open_source(str(tmp_path))


def test_without_pyav_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "a.mp4", frames=1)
    decoder.library.cache_clear()
    monkeypatch.setitem(sys.modules, "av", None)
    try:
        with pytest.raises(UserError, match=r"^clips need PyAV, which is not here .*pip install 'simmim\[video\]'$"):
            open_source(str(tmp_path))
    finally:
        decoder.library.cache_clear()


def test_a_folder_a_list_a_clip_and_the_scheme_open_clips(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "deep" / "a.MP4", frames=2) if (tmp_path / "deep").mkdir() is None else None
    (tmp_path / "list.txt").write_text("deep/a.MP4\n")
    unnamed = tmp_path / "b"
    unnamed.write_bytes(clip.read_bytes())
    for data in (str(tmp_path), str(tmp_path / "list.txt"), str(clip), f"video:{tmp_path}", f"video:{unnamed}"):
        assert len(open_source(data, "1")) == 2, data
    assert len(open_files([str(clip), str(clip)], "1")) == 4


def test_pictures_beside_clips_win_and_a_line_says_so(tmp_path: Path) -> None:
    from PIL import Image

    write_clip(tmp_path / "a.mp4", frames=2)
    Image.fromarray(picture(0)).save(tmp_path / "cover.png")
    source = open_source(str(tmp_path))
    assert [source.name(index) for index in range(len(source))] == [str(tmp_path / "cover.png")]
    assert warn_of_clips(source) == "1 clip beside the images is left out; write video:FOLDER to read clips alone"
    assert len(open_source(f"video:{tmp_path}", "1")) == 2


def test_sounds_beside_clips_win_and_a_line_says_so(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        write_clip(tmp_path / label / "a.mp4", frames=2)
        for name in ("b.wav", "c.wav"):
            soundfile.write(tmp_path / label / name, np.zeros(800, np.float32), 8000)
    sounds = ["cat/b.wav", "cat/c.wav", "dog/b.wav", "dog/c.wav"]
    source, labelled = open_source(str(tmp_path)), open_labelled(str(tmp_path))
    assert [source.name(index) for index in range(len(source))] == [str(tmp_path / name) for name in sounds]
    assert len(labelled.train) + len(labelled.val) == 4 and clips_of(labelled.train) is None
    assert names_sounds(str(tmp_path))
    assert warn_of_clips(source) == "2 clips beside the sounds are left out; write video:FOLDER to read clips alone"


def test_a_list_of_clips_and_pictures_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=1)
    (tmp_path / "list.txt").write_text("a.mp4\nb.png\n")
    with pytest.raises(UserError, match=r"^the data holds clips, such as .*a\.mp4, and others, such as .*b\.png; give"):
        open_source(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    "word", ["", "0", "0s", "-1", "1.5", "keys", "9" * 20, "9" * 20 + "s", "1s+distinct=0", "1s+distinct=1.2.3"]
)
def test_what_is_no_choice_of_frames_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"^frames .* is not a choice of frames; write 1s "):
        from_settings(PretrainConfig, {"frames": word})


def test_a_choice_of_frames_has_one_spelling() -> None:
    words = ("1.0s", "0.50s+distinct=4", "007", "KEY", "key+distinct=2.50")
    assert [from_settings(PretrainConfig, {"frames": word}).frames for word in words] == [
        "1s", "0.5s+distinct", "7", "key", "key+distinct=2.5",
    ]  # fmt: skip


def test_a_choice_of_frames_is_refused_where_there_are_no_clips() -> None:
    with pytest.raises(UserError, match=r"^--frames key is for clips, and demo holds none; leave it out$"):
        open_source("demo", "key")


def test_one_line_counts_clips_and_frames(tmp_path: Path) -> None:
    for name in "ab":
        write_clip(tmp_path / f"{name}.mp4", frames=30)
    line = "4 of 60 frames of 2 clips: one a second (--frames 1s)"
    assert describe_frames(open_source(str(tmp_path))) == line


def test_windows_of_frames_are_counted_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = clips(write_clip(tmp_path / "a.mp4", frames=3))
    monkeypatch.setattr(Clips, "read", None)
    windows = Windows(source, (24, 32))
    assert len(windows) == 3 * 4 and clips_of(windows) is source


def test_whole_clips_of_a_class_are_held_out(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for name in "abcd":
            write_clip(tmp_path / label / f"{name}.mp4", frames=6)
    found = open_labelled(str(tmp_path), val_fraction=0.25, frames="2")
    train, val = (
        [source.name(index).partition("#")[0] for index in range(len(source))] for source in (found.train, found.val)
    )
    assert (len(train), len(val)) == (18, 6) and not set(train) & set(val)
    assert [found.classes[label] for label in found.val_labels] == [Path(name).parent.name for name in val]
    assert clips_of(found.train) is not None


def test_whole_clips_are_held_out_though_the_first_cannot_be_read(tmp_path: Path) -> None:
    folder, shards = tmp_path / "set", str(tmp_path / "shards")
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for name in "abcd":
            write_clip(folder / label / f"{name}.mp4", frames=6)
    (folder / "cat" / "a.mp4").write_bytes(b"nothing")
    assert main(["pack", str(folder), "--out", shards, "--frames", "2", "--max-bad-fraction", "0.5"]) == 0
    for data, frames in ((str(folder), "2"), (shards, "1s")):
        found = open_labelled(data, val_fraction=0.25, frames=frames)
        train, val = (
            {source.name(index).partition("#")[0] for index in range(len(source))}
            for source in (found.train, found.val)
        )
        assert (len(train), len(val)) == (6, 2) and not train & val, data


def test_labels_of_clips_named_by_the_scheme_are_their_folders(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        write_clip(tmp_path / label / "a.mp4", frames=2)
    source, labels = open_with_labels(f"video:{tmp_path}", "1")
    assert labels.names(np.arange(len(source))) == ["cat", "cat", "dog", "dog"]
