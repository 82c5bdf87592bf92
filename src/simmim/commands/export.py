"""`simmim export`: a run's model as other tools read it, reloaded and compared before it is there."""

from pathlib import Path

from simmim.errors import UserError
from simmim.training.run_directory import find_model, find_task_of, read_pretraining
from simmim.training.whole_files import new_directory

FORMATS = ("timm", "transformers", "onnx", "official")


def export(run: str | Path, *, format: str, out: str | Path, allow_loss: bool = False) -> list[str]:
    """Write the model of a run to the new directory `out`; returns what was written and compared, line by line.

    The directory appears only after what is in it was reloaded by the tools that it is for and gave the same outputs.
    Raises `UserError` for a run without a model, a format that has no place for it, a part of it that would be lost
    (unless `allow_loss`), a package that is missing, or an `out` that exists.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is not known; choose from {', '.join(FORMATS)}")
    path = Path(run)
    if find_task_of(path):
        find_model(path)
    else:
        read_pretraining(path)
    from simmim.torch_engine.interop.export import export_official, export_timm, open_exported
    from simmim.torch_engine.interop.export_onnx import export_onnx
    from simmim.torch_engine.interop.export_transformers import export_transformers

    exporters = dict(zip(FORMATS, (export_timm, export_transformers, export_onnx, export_official), strict=True))
    source = open_exported(path, format)
    if source.hears is not None and format not in ("timm", "onnx"):
        raise UserError(f"{run} is of sounds, which format {format} has no place for; use --format timm or onnx")
    with new_directory(out) as directory:
        return exporters[format](source, directory, allow_loss)
