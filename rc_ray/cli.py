"""The command line: parses, calls the Python interface, prints. See `rc-ray --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rc_ray.config import RewardTrainingConfig
from rc_ray.config.base import NAME_PATTERN
from rc_ray.errors import ConfigError, RcRayError

DESCRIPTION = """Sample answers from a policy, score them under several objectives, keep the pairs on which all agree
(Reward Consistency, arXiv 2504.11337), and train with DPO, on Ray."""

EXAMPLES = """examples:
  rc-ray doctor                                        is this machine ready?
  rc-ray plan my.yaml                                  validate; show pools, tokens and rough time; start nothing
  rc-ray run my.yaml --set generation.num_candidates=8 run all stages in the directory `output`; again: resume
  rc-ray select runs/demo                              one stage of an existing run directory
  rc-ray score my.yaml --input groups/ --output scored/  one stage on data of your own
  rc-ray select --input scored.parquet --output selected/ --report   pairs from scored answers, without Ray; again: resume
"""

STAGE_HELP = {
    "sample": ("sample candidates with vLLM", "prompts: Parquet, JSONL or CSV", "folder for the groups"),
    "score": ("add the rewards of every objective", "folder with groups in Parquet", "folder for the scored groups"),
    "select": (
        "select pairs by Reward Consistency or another strategy",
        "Parquet or JSONL file, folder or glob with scored groups, or with chosen/rejected pairs for rc_filter",
        "folder for pairs/ and drops/",
    ),
    "train": ("train the policy with DPO", "folder with pairs in Parquet", "folder for the policy"),
    "evaluate": (
        "compare rewards before and after on held-out prompts",
        "model to compare with the configured one",
        "JSON file",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `rc-ray`; returns the exit code (2 configuration, 3 data, 4 model, 5 cluster, 6 resume)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    # Reward functions of the user's own are found in the folder the command is called from, here and on Ray's workers.
    sys.path.append(os.getcwd())
    # Ray and Hugging Face libraries read these when they are imported, which happens later.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return int(options.handler(options) or 0)
    except RcRayError as error:
        print(f"rc-ray: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("rc-ray: interrupted; what was committed is kept, run the same command again to resume", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rc-ray", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run all stages, or resume", description="Runs all stages; on an existing run directory, resumes."
    )
    _config_options(run, "YAML file, `embedded:demo`, or an existing run directory")
    run.add_argument(
        "--fork-from", metavar="RUN", help="begin with the candidates and rewards of another run that are still valid"
    )
    run.set_defaults(handler=_run)

    for name, (help_text, input_help, output_help) in STAGE_HELP.items():
        stage = commands.add_parser(
            name,
            help=help_text,
            description=f"Stage `{name}`: {help_text}. On a run directory it is resumable; with --input and --output it works on data "
            "of your own, in one go.",
        )
        _config_options(stage, "run directory, YAML file, or `embedded:demo`", optional=name == "select")
        stage.add_argument("--input", help=input_help)
        stage.add_argument("--output", help=f"{output_help}; with --input only")
        stage.set_defaults(handler=_stage)
        if name == "select":
            stage.add_argument("--report", action="store_true", help="also print numbers about the data, and write report.json")
            stage.set_defaults(handler=_select)
        if name == "train":
            stage.add_argument("--list-recipes", action=_ListRecipes, help="show what training.recipe can be, and end")
            stage.add_argument("--preflight", action="store_true", help="only look for what is wrong with the pairs")
            stage.set_defaults(handler=_train)

    report = commands.add_parser(
        "report", help="write the report again", description="Writes metrics.json, report/index.html and README.md."
    )
    report.add_argument("run_directory")
    report.set_defaults(handler=_report)

    plan = commands.add_parser(
        "plan",
        help="validate and preview, start nothing",
        description="Prints the resolved configuration (all keys), pools with the reason for each size, prompts, tokens, rough time.",
    )
    _config_options(plan, "YAML file or `embedded:demo`")
    plan.add_argument("--cpus", type=float, help="CPUs of the cluster to plan for (default: this machine)")
    plan.add_argument("--gpus", type=float, help="GPUs of the cluster to plan for (default: 0)")
    plan.add_argument(
        "--pilot",
        type=int,
        metavar="PROMPTS",
        help="instead, sample and score so many prompts on the cluster that is there, and predict pairs, tokens, hours and cost",
    )
    plan.add_argument("--price-per-gpu-hour", type=float, help="with --pilot; on CPUs the price of the cluster for an hour")
    plan.set_defaults(handler=_plan)

    doctor = commands.add_parser(
        "doctor", help="check this machine", description="Checks Python, packages, Ray, accelerators; names the fix."
    )
    doctor.set_defaults(handler=_doctor)

    calibrate = commands.add_parser(
        "calibrate",
        help="how far rewards can be trusted, on labelled pairs",
        description="Scores labelled pairs under every objective of a configuration and prints accuracy, calibration, agreement, and the margins "
        "at which RC pairs agree with the labels as often as wanted.",
    )
    _config_options(calibrate, "YAML file, `embedded:demo`, or an existing run directory")
    calibrate.add_argument(
        "--pairs",
        action="append",
        required=True,
        metavar="OBJECTIVE=FILE",
        help="pairs labelled for this objective, as for train-reward; may be given several times",
    )
    calibrate.add_argument("--precision", type=float, default=0.9, help="wanted share of RC pairs that agree with the labels")
    calibrate.add_argument("--output", help="new folder for calibration.json and reliability.png")
    calibrate.set_defaults(handler=_calibrate)

    reward = commands.add_parser(
        "train-reward",
        help="train a reward model on preference pairs",
        description="Trains a sequence classifier by the Bradley-Terry likelihood, on Ray Train, and prints accuracy and calibration on held-out "
        "pairs. Run again, it resumes. Several sets, each with a name, are learned together.",
    )
    reward.add_argument(
        "--pairs",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="JSONL, JSON or Parquet with prompt/chosen/rejected, or embedded:helpful|harmless; with a name it may be given several times",
    )
    reward.add_argument("--output", required=True, help="folder for the model, or embedded:reward-NAME for the cache")
    for name, field in RewardTrainingConfig.model_fields.items():
        flag = "--epochs" if name == "num_epochs" else f"--{name.replace('_', '-')}"
        # Values are checked by the configuration, which says more than a parser could.
        shown = f"{' '.join((field.description or '').split())} Default: {field.default}".replace("%", "%%")
        switch: dict[str, Any] = {"action": "store_true", "default": None} if field.annotation is bool else {"metavar": "VALUE"}
        reward.add_argument(flag, dest=name, help=shown, **switch)
    reward.set_defaults(handler=_train_reward)
    return parser


class _ListRecipes(argparse.Action):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from rc_ray.training.recipes import RECIPES

        for name, line in RECIPES.items():
            _emit(f"{name:16}  {line}")
        parser.exit()


def _config_options(parser: argparse.ArgumentParser, help_text: str, optional: bool = False) -> None:
    if optional:
        parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"{help_text}; may be left out with --input")
    else:
        parser.add_argument("config", metavar="CONFIG", help=help_text)
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, e.g. --set generation.num_candidates=8; may be given several times",
    )


def _emit(line: str) -> None:
    print(line, flush=True)


def _source(options: argparse.Namespace) -> object:
    """The configuration to use: of a run directory, when one is named, else the file."""
    if Path(options.config).is_dir() or "://" in options.config:
        from rc_ray.ledger.rundir import open_existing

        return open_existing(options.config).config()
    return options.config


def _run(options: argparse.Namespace) -> None:
    from rc_ray.pipeline.rounds import run_rounds

    run_rounds(_source(options), options.overrides, fork_from=options.fork_from, emit=_emit)  # type: ignore[arg-type]


def _stage(options: argparse.Namespace) -> None:
    from rc_ray import api
    from rc_ray.config import load_config
    from rc_ray.errors import DataError
    from rc_ray.ledger.storage import Folder
    from rc_ray.pipeline.run import run

    name = options.command
    if options.input is None:
        if options.output is not None:
            raise ConfigError(
                f"--output = {options.output!r} has no effect without --input; the run directory is `output` in the configuration"
            )
        run(_source(options), options.overrides, only=name, emit=_emit)  # type: ignore[arg-type]
        return
    if options.output is None:
        raise ConfigError("--output is missing; with --input, say where the result goes")
    config = load_config(_source(options), options.overrides)  # type: ignore[arg-type]
    if name == "evaluate" and not Path(options.output).absolute().parent.is_dir():
        raise DataError(f"--output = {options.output!r}: its folder does not exist; make it first")
    target = Folder.at(options.output)
    if name != "train" and not target.is_empty():  # a training that was killed may go on
        raise DataError(f"--output = {options.output!r}: it exists and is not empty; give a new place")
    if name == "sample":
        api.sample(config, options.input).write_parquet(target.uri)
    elif name == "score":
        api.score(config, options.input).write_parquet(target.uri)
    elif name == "train":
        api.train(config, options.input, options.output)
    else:
        import json

        Path(options.output).write_text(json.dumps(api.evaluate(config, options.input), indent=1))
    _emit(f"{name} finished: {options.output}")


def _train(options: argparse.Namespace) -> None:
    if not options.preflight:
        _stage(options)
        return
    from rc_ray.api import preflight

    found = preflight(_source(options), options.input, overrides=options.overrides)  # type: ignore[arg-type]
    left_out = f", {found.too_long} longer than training.max_length left out" if found.too_long else ""
    repeated = f", {found.repeated} pairs taken twice per epoch so that all workers have equally many" if found.repeated else ""
    _emit(
        f"train preflight: {found.num_pairs} pairs{left_out}, longest {found.longest_pair} tokens, {found.steps} steps{repeated}; nothing wrong"
    )


def _select(options: argparse.Namespace) -> None:
    """Selection on files runs here, in one process; on a run directory, on Ray as the other stages."""
    from rc_ray.config import load_selection
    from rc_ray.pipeline.select_files import report_of_run, select_files

    if options.input is not None and options.output is not None:
        source = None if options.config is None else _source(options)
        config = load_selection(source, options.overrides)  # type: ignore[arg-type]
        select_files(options.input, options.output, config, _emit, options.report)
        _emit(f"select finished: {options.output}")
        return
    if options.config is None:
        raise ConfigError("give a run directory, or --input and --output")
    _stage(options)
    if options.report:
        report_of_run(_source(options), options.overrides, _emit)  # type: ignore[arg-type]


def _report(options: argparse.Namespace) -> None:
    from rc_ray.api import report

    _emit(report(options.run_directory))


def _plan(options: argparse.Namespace) -> None:
    from rc_ray.pipeline.preview import plan

    if options.price_per_gpu_hour is not None and options.pilot is None:
        raise ConfigError(
            "--price-per-gpu-hour has no effect without --pilot; give the number of prompts to sample, e.g. --pilot 64"
        )
    if options.pilot is None:
        shown = plan(_source(options), options.overrides, cpus=options.cpus, gpus=options.gpus).lines()  # type: ignore[arg-type]
    elif options.cpus is not None or options.gpus is not None:
        raise ConfigError(
            "--cpus and --gpus have no effect with --pilot, which runs on the cluster that is there; leave them out"
        )
    else:
        from rc_ray.pipeline.pilot import pilot

        shown = pilot(
            _source(options), options.overrides, num_prompts=options.pilot, price=options.price_per_gpu_hour, emit=_emit
        ).lines()
    for line in shown:
        _emit(line)


def _doctor(options: argparse.Namespace) -> int:
    from rc_ray.doctor import diagnose

    findings = diagnose()
    for finding in findings:
        _emit(finding.line())
    return int(any(finding.status == "bad" for finding in findings))


def _calibrate(options: argparse.Namespace) -> None:
    from rc_ray.api import calibrate

    found = calibrate(
        _source(options),  # type: ignore[arg-type]
        _by_name(options.pairs),
        options.output,
        precision=options.precision,
        overrides=options.overrides,
        emit=_emit,
    )
    for line in found.lines():
        _emit(line)


def _train_reward(options: argparse.Namespace) -> None:
    from rc_ray.api import train_reward

    given = {name: getattr(options, name) for name in RewardTrainingConfig.model_fields if getattr(options, name) is not None}
    for line in train_reward(_pairs(options.pairs), options.output, given, emit=_emit).lines():
        _emit(f"train-reward  {line}")


def _pairs(given: list[str]) -> str | dict[str, str]:
    """One file, or one per name."""
    named = [value.partition("=") for value in given]
    if len(given) == 1 and not (named[0][1] and NAME_PATTERN.match(named[0][0])):
        return given[0]
    return _by_name(given)


def _by_name(given: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for value in given:
        name, mark, path = value.partition("=")
        if not mark or name in pairs:
            raise ConfigError(f"--pairs = {value!r}: expected OBJECTIVE=FILE, each objective once")
        pairs[name] = path
    return pairs


if __name__ == "__main__":
    sys.exit(main())
