"""Questions to a chat model in a vLLM engine of this process.

Prompts are rendered with the model's own chat template and go to vLLM as token ids; JSON follows its schema without white space, so that no
reply can be spent on it. Invariant: see `chat`; a question that does not fit the engine's context is not asked, and never cut.
"""

from __future__ import annotations

import os
from typing import Any

from rc_ray.config import JudgeReward
from rc_ray.core.ids import Message
from rc_ray.errors import ModelError
from rc_ray.generation.engine import EngineDied, hide_llvmlite
from rc_ray.generation.hardware import alone_on_gpu, engine_choices, scoring_environment
from rc_ray.generation.render import PromptRenderer
from rc_ray.models.resolve import local_model, max_context
from rc_ray.rewards.base import reward_dtype
from rc_ray.rewards.chat import Reply, Wanted

# Where `max_length` is not given: models with longer contexts would need memory for a question as long.
DEFAULT_MAX_LENGTH = 8192
# Weights are safetensors, and JSON has no white space (which vLLM takes with a named backend only).
CHOICES = {"load_format": "safetensors", "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}


class EngineChat:
    """A model loaded with vLLM.

    Raises:
        ModelError: its chat template refuses a system message, or it has none.
    """

    def __init__(self, config: JudgeReward, on_gpu: bool, num_threads: int) -> None:
        self.num_requests = 0
        os.environ.update(scoring_environment(config.engine_arguments, on_gpu, num_threads))
        path = local_model(config.model)
        self._renderer = PromptRenderer(path, config.revision, config.trust_remote_code)
        try:
            self._renderer([{"role": "system", "content": "Judge."}, {"role": "user", "content": "{}"}])
        except Exception as error:
            raise ModelError(
                f"judge {config.model!r}: its chat template refuses a system message and a question ({type(error).__name__}: {error}); use "
                "a model whose template takes them"
            ) from None
        self._max_length = config.max_length or min(
            DEFAULT_MAX_LENGTH, max_context(config.model, config.revision) or DEFAULT_MAX_LENGTH
        )
        num_gpus = 1.0 if config.pool.num_gpus is None else config.pool.num_gpus
        choices = engine_choices(config.engine_arguments, self._max_length, on_gpu, num_gpus)
        arguments: dict[str, Any] = CHOICES | {name: value for name, (value, _) in choices.items()} | config.engine_arguments
        hide_llvmlite()
        from vllm import LLM

        with alone_on_gpu(on_gpu, num_gpus):
            self._llm = LLM(
                model=path,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=reward_dtype(config.dtype, on_gpu),
                max_model_len=self._max_length,
                **arguments,
            )

    def ask(self, questions: list[list[Message]], wanted: Wanted) -> list[Reply]:
        """See `ChatModel.ask`.

        Raises:
            EngineDied: the engine cannot go on.
        """
        rendered = [self._render(question, wanted) for question in questions]
        answers = iter(self._generate([ids for ids in rendered if not isinstance(ids, Reply)], wanted))
        return [ids if isinstance(ids, Reply) else next(answers) for ids in rendered]

    def _render(self, question: list[Message], wanted: Wanted) -> list[int] | Reply:
        """Token ids, or why the question cannot be asked."""
        try:
            ids = self._renderer(question)
        except Exception as error:  # a template may refuse any conversation
            return Reply(error=f"the judge's chat template: {type(error).__name__}: {error}"[:300])
        if len(ids) + wanted.max_tokens > self._max_length:
            return Reply(
                error=f"{len(ids)} tokens of a question and {wanted.max_tokens} of a reply exceed the judge's max_length of {self._max_length}"
            )
        return ids

    def _generate(self, prompts: list[list[int]], wanted: Wanted) -> list[Reply]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        if not prompts:
            return []
        params = SamplingParams(
            temperature=0,
            max_tokens=wanted.max_tokens,
            logprobs=wanted.num_first_tokens or None,
            structured_outputs=None if wanted.schema is None else StructuredOutputsParams(json=wanted.schema),
        )
        # What vLLM refuses is raised here, and leaves the engine as it was.
        self._llm.enqueue([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        try:
            outputs = self._llm.wait_for_completion(use_tqdm=False)
        except Exception as error:
            raise EngineDied(f"{type(error).__name__}: {error}") from error
        if len(outputs) != len(prompts):
            raise EngineDied(f"vLLM returned {len(outputs)} outputs of {len(prompts)}")
        self.num_requests += len(prompts)
        return [self._reply(output.outputs[0]) for output in outputs]

    @staticmethod
    def _reply(output: Any) -> Reply:
        first = output.logprobs[0].values() if output.logprobs else ()
        tokens = tuple((str(each.decoded_token), float(each.logprob)) for each in first)
        return Reply(output.text, output.finish_reason == "length", tokens)
