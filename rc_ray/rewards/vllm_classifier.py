"""Rewards from a sequence classifier in vLLM: what several texts begin with, such as the prompt of N answers, is read once.

The engine gets token ids, encoded as for plain transformers, and returns bare logits. It lives in a thread of its own, since each thread
that computes has OpenMP threads of its own. Invariant: a text longer than the limit has no score; vLLM is never asked for one.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rc_ray.config import ClassifierReward
from rc_ray.errors import ModelError
from rc_ray.generation.engine import EngineDied, hide_llvmlite
from rc_ray.generation.hardware import alone_on_gpu, scoring_choices, scoring_environment
from rc_ray.models.resolve import local_model
from rc_ray.rewards.base import Score, reward_dtype
from rc_ray.rewards.batches import too_long
from rc_ray.rewards.classifier import Classifier
from rc_ray.rewards.encoding import encode
from rc_ray.rewards.self_test import padding_at_the_end

# The modules whose rows are the labels, in the classifiers of transformers.
HEADS = frozenset({"score", "classifier"})


class VllmClassifier(Classifier):
    """One sequence classifier in one vLLM engine.

    Raises:
        ModelError: vLLM cannot run it, or not as transformers does.
    """

    def __init__(self, config: ClassifierReward, on_gpu: bool, num_threads: int) -> None:
        os.environ.update(scoring_environment(config.engine_arguments, on_gpu, num_threads))
        from transformers import AutoConfig, AutoTokenizer

        path = local_model(config.model)
        options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        model_config = AutoConfig.from_pretrained(path, **options)
        super().__init__(config, AutoTokenizer.from_pretrained(path, **options), model_config)
        text_config = model_config.get_text_config()
        self.dtype, self.pad_token_id = reward_dtype(config.dtype, on_gpu), text_config.pad_token_id
        if (padding := padding_at_the_end(self.tokenizer, self.pad_token_id)) is not None:
            raise ModelError(
                f"reward model {self._name!r}: its texts end with its padding token {padding!r}, where transformers takes the token before and vLLM that one; "
                "use engine: transformers, with `self_test: false` if this is how it was trained"
            )
        rope = getattr(text_config, "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings") or self.limit
        if rope.get("rope_type") == "longrope" and original is not None and (self.limit or math.inf) > original:
            raise ModelError(
                f"reward model {self._name!r}: with a limit of {self.limit} tokens vLLM reads its short texts otherwise than transformers (longrope); "
                f"set max_length: {original}, or use engine: transformers"
            )
        self._token_types_start(encode(self.tokenizer, [{"role": "user", "content": "a"}], "a"))
        longest = max(config.max_batch_tokens, self.limit or 0)
        share = 1.0 if config.pool.num_gpus is None else config.pool.num_gpus
        choices = scoring_choices(config.engine_arguments, longest, on_gpu, share)
        arguments = {name: value for name, (value, _) in choices.items()} | config.engine_arguments
        self._thread = ThreadPoolExecutor(1, "vllm-classifier")
        with alone_on_gpu(on_gpu, share):
            self._engine = self._thread.submit(self._load, path, options | arguments, num_threads, on_gpu).result()
        # Where neither the model nor its tokenizer has a limit, vLLM has one.
        self.limit = self._engine.model_config.max_model_len
        self._begin(config)

    def _load(self, path: str, arguments: dict[str, Any], num_threads: int, on_gpu: bool) -> Any:
        import torch

        hide_llvmlite()
        from vllm import LLM

        if not on_gpu:
            torch.set_num_threads(num_threads)
        try:
            engine = LLM(
                path,
                runner="pooling",
                convert="classify",
                load_format="safetensors",
                dtype=self.dtype,
                max_model_len=self.limit,
                **arguments,
            )
        except Exception as error:  # of many kinds, for whatever it does not take
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:800]
            raise ModelError(
                f"reward model {self._name!r} does not run in vLLM: {reason}; change engine_arguments or max_length, or use engine: transformers"
            ) from error
        if not _has_head(path, arguments["revision"]):  # vLLM would take whatever is in memory
            raise ModelError(
                f"reward model {self._name!r} has no weights of a head ({' or '.join(sorted(HEADS))}), so its rewards would be random; give a model "
                "that was trained as a sequence classifier"
            )
        pooling, usual = engine.model_config.pooler_config, engine.model_config._model_info.default_seq_pooling_type
        if pooling.seq_pooling_type != usual:
            raise ModelError(
                f"reward model {self._name!r}: vLLM takes {pooling.seq_pooling_type} of its tokens rather than {usual}, by modules.json in its folder, "
                "and transformers does not; use engine: transformers"
            )
        return engine

    def _token_types_start(self, text: dict[str, list[int]]) -> int | None:
        """Where the second part of a pair begins, for models that know token types; None where there is none.

        Raises:
            ModelError: the types are others than vLLM can be told.
        """
        types = text.get("token_type_ids") or []
        first = types.index(1) if 1 in types else len(types)
        if types != [0] * first + [1] * (len(types) - first):
            raise ModelError(
                f"reward model {self._name!r}: its tokenizer gives token types other than zeros and then ones, which vLLM cannot be told; "
                "use engine: transformers"
            )
        return first if first < len(types) else None

    def _run(self, texts: list[dict[str, list[int]]]) -> list[Score]:
        scores: list[Score] = [Score(None)] * len(texts)
        fitting = []
        for i, text in enumerate(texts):
            why = too_long(len(text["input_ids"]), self.limit)
            if why:
                scores[i] = Score(None, why)
                self._counts["num_too_long"] += 1
            else:
                fitting.append(i)
        if fitting:
            # Texts that begin alike one after the other, while what they share is still cached.
            fitting.sort(key=lambda i: texts[i]["input_ids"])
            logits = self._thread.submit(self._ask, [texts[i] for i in fitting]).result()
            for i, value in zip(fitting, self._rewards(logits), strict=True):
                scores[i] = Score.checked(value)
        return scores

    def _ask(self, texts: list[dict[str, list[int]]]) -> Any:
        """The logits [texts, labels]."""
        import torch
        from vllm import PoolingParams

        asked = []
        for text in texts:
            start = self._token_types_start(text)
            types = None if start is None else {"compressed_token_type_ids": start}
            asked.append(PoolingParams(use_activation=False, extra_kwargs=types))
        prompts = [{"prompt_token_ids": text["input_ids"]} for text in texts]
        try:
            outputs = self._engine.encode(prompts, asked, pooling_task="classify", use_tqdm=False)
        except (ValueError, TypeError):
            raise  # refused, which leaves the engine as it was
        except Exception as error:
            raise EngineDied(f"{type(error).__name__}: {error}") from error
        length = sum(len(text["input_ids"]) for text in texts)
        cached = sum(output.num_cached_tokens for output in outputs)
        self._counts.update(num_texts=len(texts), num_tokens=length, num_padded_tokens=length, num_cached_tokens=cached)
        return torch.stack([output.outputs.data for output in outputs])


def _has_head(path: str, revision: str | None) -> bool:
    """Whether the weights of a model that is on this machine hold those of a classifier's head."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(path if Path(path).is_dir() else snapshot_download(path, revision=revision, local_files_only=True))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if any(HEADS & set(name.split(".")) for name in tensors.keys()):  # noqa: SIM118
                return True
    return False
