"""Dispatch to the configured engine. Engines do not know each other; each is loaded on first use."""

from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import FinetuneConfig
from simmim.output import say
from simmim.training.loop import Outcome
from simmim.training.run_directory import Run
from simmim.training.session import Watch


def pretrain(config: PretrainConfig) -> tuple[Run, Outcome]:
    """Pretrain, or resume, with the engine of the configuration, and write the report; see `simmim.pretrain`."""
    if config.engine == "keras":
        from simmim.keras_engine import use_backend

        use_backend(config.backend or "jax")
        from simmim.keras_engine.pretrain import pretrain
    else:
        from simmim.torch_engine.train.pretrain import pretrain
    return _reported(*pretrain(config, _live_report()))


def finetune(config: FinetuneConfig) -> tuple[Run, Outcome]:
    """Fine-tune, or resume, and write the report; see `simmim.finetune`."""
    from simmim.torch_engine.train.finetune import finetune

    return _reported(*finetune(config, _live_report()))


def _live_report() -> Watch:
    from simmim.report.live import LiveReport

    return LiveReport()


def _reported(run: Run, outcome: Outcome) -> tuple[Run, Outcome]:
    """Write RUN/report.html and say so. A training never fails for its report, whatever is wrong with that."""
    if not outcome.is_main:
        return run, outcome
    page = run.path / "report.html"
    if outcome.step == outcome.start and page.is_file():  # nothing was done: it may hold what took minutes
        say(f"the report is {page}")
        return run, outcome
    try:
        from simmim.report.page import ReportConfig, report

        line = f"the report is {report(ReportConfig(runs=(str(run.path),)))}"
    except Exception as error:
        line = f"warning    no report: {type(error).__name__}: {error}".splitlines()[0]
    say(line)
    return run, outcome
