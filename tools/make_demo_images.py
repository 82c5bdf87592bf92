r"""Build the demo image set that ships inside the package: ``src/simmim/data/demo.zip``.

Sources, both from the npm registry and both under the MIT licence:

* ``@lobehub/fluent-emoji-3d`` 1.1.0: the pictures, Microsoft's Fluent Emoji in 3D style as
  256x256 WebP files, packaged by LobeHub.
* ``emoji-datasource-google`` 16.0.0 by Cal Henderson: ``emoji.json``, from which the order and the
  categories (our labels) come.  None of its pictures are used.

To rebuild, with Pillow (WebP support included) and NumPy installed::

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0
    python tools/make_demo_images.py \
        lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-google-16.0.0.tgz

The zip holds 64x64 RGB pictures on white as ``<label>/<codepoints>.webp``, and ``LICENSE``; the
licence text is written next to it as ``demo_LICENSE.txt`` too.  Running the tool again gives the
same bytes.  Another release of Pillow or libwebp may encode the same pictures to other bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OUT = Path(__file__).resolve().parents[1] / "src" / "simmim" / "data"
SIZE = 64  # side of a finished picture
QUALITY = 84  # WebP quality; brings the whole set to about 1 MB
MAX_PER_LABEL = 150  # keeps the large categories from swamping the small ones
MAX_SIMILARITY = 0.985  # pictures more alike than this count as duplicates
THUMB = 32  # side of the thumbnails on which likeness is measured

# Flags, skin tone swatches, letters, digits, arrows, plain shapes: little to learn from.
SKIPPED_GROUPS = {"Flags", "Component", "alphanum", "arrow", "av-symbol"}
SKIPPED_GROUPS |= {"geometric", "keycap", "zodiac"}
SKIPPED_NAMES = re.compile(r"clock\d+|copyright|registered|tm")
# Sequences that restate a neutral person as a man or a woman, and families spelled out.
GENDERED = re.compile(r"1F46[89]-|.*-200D-264[02]")

LICENSE_HEAD = """\
The pictures in demo.zip are scaled-down copies of Fluent Emoji by Microsoft Corporation
(https://github.com/microsoft/fluentui-emoji), taken from the npm package
@lobehub/fluent-emoji-3d 1.1.0 by LobeHub (https://github.com/lobehub/fluent-emoji).
Their labels are the categories in the npm package emoji-datasource-google 16.0.0 by
Cal Henderson (https://github.com/iamcal/emoji-data).  All three are under the MIT License:

MIT License

Copyright (c) Microsoft Corporation.
Copyright (c) 2023 LobeHub
"""


def read_package(path: Path, name: str, version: str, wanted: str) -> dict[str, bytes]:
    """Return the files of an npm tarball whose path inside it matches ``wanted``."""
    files: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            inner = member.name.removeprefix("package/")
            stream = tar.extractfile(member)  # None for a folder
            if stream and re.fullmatch(rf"package\.json|{wanted}", inner):
                files[inner] = stream.read()
    meta = json.loads(files["package.json"])
    found = (meta["name"], meta["version"], meta["license"])
    if found != (name, version, "MIT"):
        raise SystemExit(f"{path}: expected {name} {version} under MIT, found {found}")
    return files


def is_candidate(emoji: dict[str, Any]) -> bool:
    """Tell whether an ``emoji.json`` entry belongs in the set, going by its names alone."""
    if {emoji["category"], emoji["subcategory"]} & SKIPPED_GROUPS:
        return False
    return not (SKIPPED_NAMES.fullmatch(emoji["short_name"]) or GENDERED.match(emoji["unified"]))


def render(data: bytes) -> Image.Image:
    """Put a picture on white, pad it to a square where needed, and scale it down."""
    with Image.open(io.BytesIO(data)) as file:
        picture = file.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def thin_out(pictures: dict[str, Image.Image], most: int) -> dict[str, Image.Image]:
    """Drop the later of the two most similar pictures until at most ``most``, all distinct, remain.

    Likeness is the cosine between thumbnails counted as ink on white, so that pale and small
    subjects are compared by their shape and are not all alike merely for being mostly white.
    """
    names = list(pictures)
    small = [p.resize((THUMB, THUMB), Image.Resampling.BOX) for p in pictures.values()]
    ink = 255.0 - np.stack([np.asarray(s, dtype=np.float64).ravel() for s in small])
    gram = ink @ ink.T  # sums of whole numbers, exact: the same on every machine
    norm = np.sqrt(np.diag(gram))
    likeness = np.tril(gram / np.outer(norm, norm), k=-1)
    left = set(names)
    while len(left) > most or likeness.max() > MAX_SIMILARITY:
        later = int(likeness.argmax()) // len(names)
        likeness[later, :] = likeness[:, later] = -1.0
        left.remove(names[later])
    return {name: picture for name, picture in pictures.items() if name in left}


def encode(picture: Image.Image) -> bytes:
    """Return a picture as the bytes of a lossy WebP file."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> bytes:
    """Write, and return, an uncompressed zip whose bytes depend on the entries alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(entries.items()):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, also when built elsewhere
            info.external_attr = 0o100644 << 16
            archive.writestr(info, content)
    return path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo image set of the package.")
    parser.add_argument("pictures", type=Path, help="tarball of @lobehub/fluent-emoji-3d")
    parser.add_argument("data", type=Path, help="tarball of emoji-datasource-google")
    args = parser.parse_args()

    art = read_package(args.pictures, "@lobehub/fluent-emoji-3d", "1.1.0", r"assets/.*\.webp")
    data = read_package(args.data, "emoji-datasource-google", "16.0.0", r"emoji\.json|LICENSE")
    pictures: dict[str, Image.Image] = {}
    for emoji in sorted(json.loads(data["emoji.json"]), key=lambda e: e["sort_order"]):
        file = emoji["unified"].lower() + ".webp"
        if f"assets/{file}" in art and is_candidate(emoji):
            label = re.sub(r"[^a-z]+", "-", emoji["category"].lower())
            pictures[f"{label}/{file}"] = render(art[f"assets/{file}"])

    entries: dict[str, bytes] = {}
    distinct = thin_out(pictures, most=len(pictures))
    for label in sorted({name.split("/")[0] for name in pictures}):
        of_label = {name: p for name, p in distinct.items() if name.startswith(f"{label}/")}
        kept = thin_out(of_label, most=MAX_PER_LABEL)
        entries |= {name: encode(picture) for name, picture in kept.items()}
        print(f"{label:16} {len(kept):4} of {len(of_label)} distinct ones")
    print(f"{'total':16} {len(entries):4}, {sum(map(len, entries.values())):,} bytes of WebP")

    mit = data["LICENSE"].decode()  # the picture package declares MIT but holds no such file
    entries["LICENSE"] = (LICENSE_HEAD + mit[mit.index("Copyright") :].rstrip() + "\n").encode()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "demo_LICENSE.txt").write_bytes(entries["LICENSE"])
    packed = write_zip(OUT / "demo.zip", entries)
    print(f"demo.zip: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main()
