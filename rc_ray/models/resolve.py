"""Turns a model name from the configuration into something `from_pretrained` takes, or says why it cannot.

A name is `embedded:NAME`, a local folder, a folder on a pyarrow filesystem (s3://…), or a Hub id. Folders are checked:
config.json there, weights as safetensors; so are those of LoRA adapters. Invariant: nothing is unpickled, and no name is tried against the network that
looks like a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from rc_ray.errors import ModelError
from rc_ray.ledger.storage import Folder
from rc_ray.models import embedded

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_model(field: str, name: str, revision: str | None = None) -> None:
    """Checks that a model can be found, without loading it.

    Raises:
        ModelError: with the field, the name, the reason and what to do.
    """
    if name.startswith("embedded:"):
        embedded.check(field, name)
    elif "://" in name:
        _check_files(field, name, Folder.at(name).names())
    elif Path(name).expanduser().is_dir():
        _check_files(field, name, os.listdir(Path(name).expanduser()))
    elif name.startswith(("/", "./", "../", "~")) or not HUB_ID.match(name):
        raise ModelError(
            f"{field} = {name!r}: the folder does not exist; give a Hugging Face folder, a Hub id, or `embedded:NAME`"
        )
    else:
        _check_hub(field, name, revision)


def check_adapter(field: str, name: str, revision: str | None = None) -> None:
    """Checks that a LoRA adapter can be found, without loading it.

    Raises:
        ModelError: with the field, the name, the reason and what to do.
    """
    path = Path(name).expanduser()
    if "://" in name or path.is_dir():
        files = Folder.at(name).names() if "://" in name else os.listdir(path)
        for needed in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if needed not in files:
                raise ModelError(
                    f"{field} = {name!r}: the folder has no {needed}, so it is no LoRA adapter in PEFT's format with safetensors weights; "
                    "check the path, or save the adapter with PEFT's `save_pretrained`"
                )
        if path.is_dir():
            adapter_rank(field, path)
    elif name.startswith(("/", "./", "../", "~")) or not HUB_ID.match(name):
        raise ModelError(f"{field} = {name!r}: the folder does not exist; give the folder of a LoRA adapter, or a Hub id")
    else:
        _check_hub(field, name, revision, ADAPTER_CONFIG)


def adapter_rank(field: str, folder: Path) -> int:
    """Highest rank of a LoRA adapter's matrices.

    Raises:
        ModelError: it is no LoRA.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        kind = config.get("peft_type")
        if kind != "LORA":
            raise ModelError(
                f"{field} = {str(folder)!r}: peft_type is {kind!r}, and only LORA is supported; merge it into the model"
            )
        return max(int(config["r"]), *(int(r) for r in (config.get("rank_pattern") or {}).values()), 1)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{field} = {str(folder)!r}: {ADAPTER_CONFIG} cannot be read ({type(error).__name__}: {error})"
        ) from None


def local_adapter(name: str, revision: str | None = None) -> str:
    """The local folder of a LoRA adapter; one on remote storage or the Hub is downloaded once per machine."""
    path = local_model(name)
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    # Pickled weights are left where they are.
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    return str(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _check_files(field: str, name: str, files: list[str]) -> None:
    if "config.json" not in files:
        raise ModelError(
            f"{field} = {name!r}: the folder has no config.json, so it is no Hugging Face model folder; check the path"
        )
    if not any(file.endswith(".safetensors") for file in files):
        raise ModelError(
            f"{field} = {name!r}: the folder has no .safetensors weights (pickled weights are not read, they can run code); "
            "save the model with `save_pretrained`, which writes safetensors"
        )


def _check_hub(field: str, name: str, revision: str | None, file: str = "config.json") -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return
    not_local = f"{field} = {name!r}: no such local folder, and as a Hub id it"
    try:
        hf_hub_download(name, file, revision=revision, etag_timeout=4)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise ModelError(f"{not_local} was not found ({type(error).__name__}); check the name and your access") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"{not_local} is neither in the local Hub cache nor reachable ({type(error).__name__}); check the spelling, "
            "download it beforehand, or give a local folder"
        ) from None


def local_model(name: str) -> str:
    """The Hub id or local folder to load: embedded models are unpacked, remote folders downloaded, both once per machine.

    Raises:
        ModelError: the folder is not there on this machine.
    """
    if name.startswith("embedded:"):
        return str(embedded.folder(name))
    if "://" in name:
        folder = Folder.at(name)
        key = json.dumps([name, folder.listing()])  # another model may have taken its place
        target = embedded.cache_dir() / "remote" / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        with embedded.build_once(target) as staged:
            if staged is not None:
                folder.download(staged)
        return str(target)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if name.startswith(("/", "./", "../", "~")):
        raise ModelError(
            f"model folder {name!r} does not exist on node {os.uname().nodename}; put it on storage that all nodes reach, or use a Hub id"
        )
    return name


def max_context(name: str, revision: str | None = None) -> int | None:
    """Longest sequence in tokens by the model's config.json, None when it does not say or is not at hand."""
    try:
        path = Path(local_model(name)) / "config.json"
    except ModelError:
        return None
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    try:
        value = json.loads(path.read_text()).get("max_position_embeddings")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"model {name!r}: {str(path)!r} is not a model configuration: {error}") from None
    return int(value) if value else None
