"""JPEGs decoded on the GPU by nvJPEG (through torchvision), and cropped and resized there: `--decode gpu`.

Shapes: `B` images, `H W` pixels, `C` channels, `h w` the pixels of one stored image; a size is (H, W).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from simmim.data.pipeline import Reading
from simmim.data.readers.device_jpegs import Jpeg
from simmim.errors import UserError
from simmim.method.views import View
from simmim.torch_engine.accelerators import find_accelerator
from simmim.torch_engine.models.masked import Encoder
from simmim.training.plan import Batch
from simmim.training.pretrain_plan import Plan

_AT_ONCE = 2**28
"""Bytes of pixels that are decoded before they are cropped."""
_LEVELS = 4
"""Of 255, by which decoders may differ on average: each rounds its inverse transform and colours in its own way."""


class JpegDecoder:
    """Implement `simmim.data.readers.device_jpegs.Decode`: nvJPEG on CUDA, libjpeg-turbo on a CPU (for tests).

    On CUDA it has a stream of its own beside the training step's. Before each call of nvJPEG it waits for that stream,
    since nvJPEG writes to the memory that it is given without waiting for what still reads there
    (github.com/pytorch/vision/pull/9606, github.com/meta-pytorch/torchcodec/pull/1634).
    """

    def __init__(self, device: torch.device, *, size: tuple[int, int], channels: int):
        self._device, self._size, self._channels = device, size, channels
        self._stream = torch.cuda.Stream(device) if find_accelerator(device).decodes_jpegs else None

    def __call__(self, images: NDArray[np.uint8], jpegs: Sequence[Jpeg | None], fill: Callable[[int], None]) -> Tensor:
        """Decode a batch (B, H, W, C) → (B, H, W, C) uint8, which the device has when this returns."""
        with torch.cuda.stream(self._stream):  # does nothing for `None`
            batch = torch.from_numpy(images).to(self._device)
            for portion in _portions({place: jpeg for place, jpeg in enumerate(jpegs) if jpeg is not None}):
                for place in self._decode_into(batch, portion):
                    fill(place)
                    batch[place] = torch.from_numpy(images[place])
        if self._stream is not None:
            self._stream.synchronize()
            batch.record_stream(torch.cuda.current_stream(self._device))  # the step's: until it is done with them
        return batch

    def _decode_into(self, batch: Tensor, jpegs: dict[int, Jpeg]) -> list[int]:
        """Put what JPEGs show into their places; returns the places of those that are refused."""
        refused = []
        decoded = self._decode([jpeg.raw for jpeg in jpegs.values()])
        for (place, jpeg), pixels in zip(jpegs.items(), decoded, strict=True):
            if pixels is None or pixels.shape[1:] != jpeg.stored_size:
                refused.append(place)
            else:
                batch[place] = show(pixels, jpeg, self._size)
        return refused

    def _decode(self, files: Sequence[bytes]) -> list[Tensor | None]:
        """Decode JPEGs to pixels (C, h, w), `None` for those that are refused.

        nvJPEG refuses a whole call, so the one at fault is found by halving.
        """
        try:
            return [*self.decode(files)]
        except RuntimeError:
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return self._decode(files[:half]) + self._decode(files[half:])

    def decode(self, files: Sequence[bytes]) -> list[Tensor]:
        """Decode JPEGs to pixels (C, h, w) as stored. Raises `RuntimeError` if one cannot be decoded."""
        from torchvision.io import ImageReadMode, decode_jpeg  # deprecated since 0.29, so it may be gone one day

        mode = ImageReadMode.RGB if self._channels == 3 else ImageReadMode.GRAY
        if self._stream is not None:
            self._stream.synchronize()
        bytes_of_each = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        return list(decode_jpeg(bytes_of_each, mode, self._device))

    def find_fault(self) -> str | None:
        """Return why decoding does not work here, or `None`: compare a picture of many colours with libjpeg-turbo's."""
        import simplejpeg

        shades = np.linspace(0, 255, 64).astype(np.uint8)
        colours = np.stack(np.broadcast_arrays(shades[:, None], shades, np.uint8(128)), axis=-1)
        file = simplejpeg.encode_jpeg(np.ascontiguousarray(colours))
        expected = simplejpeg.decode_jpeg(file, "RGB" if self._channels == 3 else "GRAY")
        try:
            with torch.cuda.stream(self._stream):
                pixels = self.decode([file])[0].permute(1, 2, 0).cpu().numpy()
        except (RuntimeError, ImportError, AttributeError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
        off = np.abs(pixels - expected.astype(np.float32)).mean()
        return f"a test picture comes out {off:.0f} levels off" if off > _LEVELS else None


def open_decoder(plan: Plan, device: torch.device) -> JpegDecoder | None:
    """Open the decoder that `--decode` names; `None` for the CPU's threads. Raises `UserError` if it does not work."""
    config = plan.config
    if config.decode == "cpu":
        return None
    if not find_accelerator(device).decodes_jpegs:
        raise UserError(f"--decode gpu is for --device cuda, and this is {device.type}; use --decode cpu")
    if plan.images.dtype != np.uint8:
        raise UserError(f"--decode gpu gives 8 bits, and the images of {config.data} have more; use --decode cpu")
    decoder = JpegDecoder(device, size=plan.size, channels=config.channels)
    if fault := decoder.find_fault():
        raise UserError(
            f"--decode gpu does not work here: {fault}; install the torchvision that belongs to torch "
            f"{torch.__version__}, built for CUDA, or use --decode cpu"
        )
    return decoder


def read_batches(
    plan: Plan, reading: Reading, encoder: Encoder, decoder: JpegDecoder | None, views: Iterable[View] = ()
) -> Iterator[Batch]:
    """Yield the batches that an encoder trains on; decoding on a device, at its own pace, goes one batch ahead."""
    layers = encoder.drop_path_draws.layers
    batches = plan.batches(reading, patch=encoder.patch_size, drop_path_layers=layers, decode=decoder, further=views)
    return batches if decoder is None else one_ahead(batches)


def one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Make each batch ahead, in a thread that may wait for the GPU while this one starts a step."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _portions(jpegs: dict[int, Jpeg]) -> Iterator[dict[int, Jpeg]]:
    """Yield as many at a time as have `_AT_ONCE` bytes of pixels."""
    portion: dict[int, Jpeg] = {}
    room = _AT_ONCE
    for place, jpeg in jpegs.items():
        taken = 3 * jpeg.height * jpeg.width
        if portion and taken > room:
            yield portion
            portion, room = {}, _AT_ONCE
        portion[place] = jpeg
        room -= taken
    if portion:
        yield portion


def show(pixels: Tensor, jpeg: Jpeg, size: tuple[int, int]) -> Tensor:
    """Cut the wanted part out of a JPEG's pixels (C, h, w), upright, at `size`: (H, W, C) uint8."""
    if jpeg.orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    for side, mirrored in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))):
        if jpeg.orientation in mirrored:
            pixels = pixels.flip(side)
    top, left, height, width = jpeg.box
    view = pixels[:, top : top + height, left : left + width]
    if view.shape[1:] != size:
        view = interpolate(view[None].float(), size, mode="bilinear", antialias=True)[0].round_().to(torch.uint8)
    return view.permute(1, 2, 0)
