"""Images of Hugging Face data sets."""

from pathlib import Path
from typing import Any

from simmim.data.files import read_file
from simmim.data.picture import BadImage
from simmim.errors import UserError

_WHOLE = "whole"  # the only part of a set without splits


class HuggingFaceImages:
    """The image column of a `datasets.Dataset`; an `ImageSource`."""

    def __init__(self, dataset: Any, column: str):
        import datasets

        self._dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return f"{self._column} {index}"

    def read(self, index: int) -> bytes:
        stored = self._dataset[int(index)][self._column]
        if stored is None:
            raise BadImage("the data set holds no image here")
        if stored["bytes"] is not None:
            return stored["bytes"]
        return read_file(stored["path"])


def open_hugging_face(name: str) -> HuggingFaceImages:
    """Open `NAME_OR_PATH[:SPLIT]`, by default the split train or else the first. Raises `UserError`."""
    _, split, splits = find_split(name)
    return HuggingFaceImages(splits[split], image_column(splits[split], name))


def find_split(name: str) -> tuple[str, str, dict[str, Any]]:
    """Find the data set and the split that `NAME_OR_PATH[:SPLIT]` names; returns all splits too. Raises `UserError`."""
    path, split = name, ""
    if ":" in name and not Path(name).exists():
        path, _, split = name.rpartition(":")
    splits = load_hugging_face(path)
    if split and list(splits) == [_WHOLE]:
        raise UserError(f"data set hf:{path} has no splits; leave out :{split}")
    split = split or ("train" if "train" in splits else next(iter(splits)))
    if split not in splits:
        raise UserError(f"data set hf:{path} has no split {split}; choose of {', '.join(map(str, splits))}")
    return path, split, splits


def load_hugging_face(path: str) -> dict[str, Any]:
    """Load the splits of a set: a directory that `save_to_disk` wrote, a .parquet, or whatever `load_dataset` takes."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{path} needs the library datasets; pip install simmim[data]") from error
    saved = any(Path(path, file).exists() for file in ("state.json", "dataset_dict.json"))
    try:
        if path.lower().endswith(".parquet"):
            loaded: Any = datasets.load_dataset("parquet", data_files=path)
        else:
            loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # its back ends raise anything at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data set hf:{path} cannot be opened ({reason}); pass a name on the Hub or a folder"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(split): part for split, part in loaded.items()}
    return {_WHOLE: loaded}


def image_column(dataset: Any, name: str) -> str:
    """Name the column of a data set that holds images."""
    import datasets

    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UserError(f"data set hf:{name} has no image column, only {', '.join(dataset.features)}; pass another")
    return "image" if "image" in columns else columns[0]
