"""What exactly a model name stood for: content hash of a folder, commit of a Hub model. Kept in manifest.json.

Invariant: a run resumes only with the models it began with.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from rc_ray.models.resolve import ADAPTER_CONFIG, local_model

# Folders up to this size are hashed whole; of larger ones the file names, sizes and configuration.
FULL_HASH_BYTES = 4 << 30


def model_identity(name: str, revision: str | None = None, is_adapter: bool = False) -> str:
    """`sha:…` of a folder's content, `layout:…` of a very large one, or `hub:COMMIT`; of a model or a LoRA adapter."""
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
        if whole or file.suffix in (".json", ".py"):
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return f"{'sha' if whole else 'layout'}:{digest.hexdigest()}"


def hub_commit(name: str, revision: str | None, file: str = "config.json") -> str:
    """Commit of a cached Hub model that has a file, or the revision asked for when it is not cached yet."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else (revision or "main")
