"""What exactly a model name stood for: content hash of a folder, commit of a Hub model. Kept in manifest.json.

Invariant: a run resumes only with the models it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rc_ray.models.resolve import ADAPTER_CONFIG, local_model

# Weights of folders up to this size are hashed whole; of larger ones pieces of every tensor.
FULL_HASH_BYTES = 4 << 30
PIECES, PIECE_BYTES = 8, 16 << 10


def model_identity(name: str, revision: str | None = None, is_adapter: bool = False) -> str:
    """`sha:…` of a folder's content, `pieces:…` of a very large one, or `hub:COMMIT`; of a model or a LoRA adapter."""
    path = Path(local_model(name))
    if not path.is_dir():
        return f"hub:{hub_commit(name, revision, ADAPTER_CONFIG if is_adapter else 'config.json')}"
    files = sorted(
        f for f in path.rglob("*") if f.is_file() and f.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model", ".py")
    )
    whole = sum(f.stat().st_size for f in files) <= FULL_HASH_BYTES
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        # Records of how a model was made carry times, which do not matter.
        if file.name == "reward_training.json":
            continue
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}".encode())
        with file.open("rb") as stream:
            if whole or file.suffix != ".safetensors":
                while block := stream.read(1 << 20):
                    digest.update(block)
            else:
                for block in _pieces_of_tensors(stream):
                    digest.update(block)
    return f"{'sha' if whole else 'pieces'}:{digest.hexdigest()}"


def _pieces_of_tensors(stream: BinaryIO) -> Iterator[bytes]:
    """The header of a safetensors file, and of every tensor its two ends and pieces spread evenly between them; a small one whole.

    Training moves nearly every weight, and merging an adapter all of those that it touches, so two models of one layout differ there. Format: an
    unsigned 64-bit little-endian length, so many bytes of JSON with each tensor's `data_offsets`, the data
    (https://huggingface.co/docs/safetensors).
    """
    size = int.from_bytes(stream.read(8), "little")
    header = stream.read(size)
    yield header
    for tensor, facts in sorted(json.loads(header).items()):
        if tensor == "__metadata__":
            continue
        begin, end = facts["data_offsets"]
        last = max(begin, end - PIECE_BYTES)
        whole = end - begin <= PIECES * PIECE_BYTES
        for start in [begin] if whole else [begin + (last - begin) * n // (PIECES - 1) for n in range(PIECES)]:
            stream.seek(8 + size + start)
            yield stream.read(end - begin if whole else PIECE_BYTES)


def hub_commit(name: str, revision: str | None, file: str = "config.json") -> str:
    """Commit of a cached Hub model that has a file, or the revision asked for when it is not cached yet."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else (revision or "main")
