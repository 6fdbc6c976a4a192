"""Speed and exactness of classifier rewards, against what peers do and against an ideal bound.

    python tests/benchmarks/bench_rewards.py [--quick] [--output DIR] [--rounds N] [--only MODEL ...]

Eight answers to each prompt, of short, mixed and long lengths, scored by MiniLM with a random head and by a tiny Llama classifier of MiniLM's size, in float32 on all
cores. (In a much smaller one, most of the time goes into tokens, Python and attention, which grows with the square of a length, whatever the batches.)
Competitors take turns in one process; a ratio is of one round, and printed are the median and, in brackets, the lowest and highest.

rc_ray        answers sorted by length, batches under a budget of padded tokens, tokenizing included.
vllm          the same with `engine: vllm`, in a process of its own.
row by row    the `text-classification` pipeline of transformers, one text after the other.
arrival       batches of 32 in the order of arrival, padded to the longest, as peers do.
ideal         a bound: as many tokens in texts of one length, so that nothing is padded, ready as token ids; the network alone.

The two engines are compared on prompts of many lengths, whose answers vLLM reads from where they differ on. Causal models only: MiniLM looks
both ways, so nothing of it can be shared.

Exit status 1 when a bar is missed; with --quick, which runs everything on small data, only when rewards differ from the row-by-row ones.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench_sampling import classifier
from common import ROOT, begin_rounds, ratios, spread

sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tokens of an answer, from and to.
LENGTHS = {"short": (4, 24), "mixed": (4, 200), "long": (150, 200)}
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "have",
    "from",
    "or",
    "one",
    "had",
    "by",
    "word",
    "but",
    "not",
    "what",
]
PROMPT = [{"role": "user", "content": "Please say something about words, and take your time."}]
# Tokens of a prompt where engines are compared, and answers to each.
PROMPT_LENGTHS, NUM_ANSWERS = (20, 250), 8
Ask = Callable[[], list[float]]


VLLM: list[Any] = []
MODELS = ["MiniLM", "tiny Llama"]


def texts_of(tokenizer: Any, lengths: tuple[int, int], number: int) -> list[str]:
    """Random words, of about as many tokens as asked for."""
    draw = random.Random(0)
    sample = " ".join(WORDS)
    per_word = len(tokenizer(sample, add_special_tokens=False)["input_ids"]) / len(WORDS)
    return [" ".join(draw.choices(WORDS, k=max(1, round(draw.randint(*lengths) / per_word)))) for _ in range(number)]


def competitors(model: Any, answers: list[str]) -> dict[str, Ask]:
    import torch
    from transformers import pipeline

    from rc_ray.rewards.encoding import encode

    tokenizer, network = model.tokenizer, model.model
    prompts = [PROMPT] * len(answers)

    def forward(inputs: dict[str, Any]) -> list[float]:
        with torch.inference_mode():
            return list(network(**inputs).logits[:, 0].tolist())

    def ours() -> list[float]:
        return [score.value for score in model.score(prompts, answers)]

    if tokenizer.chat_template:
        conversations = [[*PROMPT, {"role": "assistant", "content": answer}] for answer in answers]
        texts: list[Any] = tokenizer.apply_chat_template(conversations, tokenize=False)
    else:
        texts = [{"text": PROMPT[0]["content"], "text_pair": answer} for answer in answers]
    # The template has written all special tokens already.
    options = {"function_to_apply": "none", "add_special_tokens": not tokenizer.chat_template}
    classify = pipeline("text-classification", model=network, tokenizer=tokenizer)

    def row_by_row() -> list[float]:
        return [found["score"] for found in classify(texts, batch_size=1, **options)]

    def arrival() -> list[float]:
        found = []
        for start in range(0, len(answers), 32):
            batch = [encode(tokenizer, PROMPT, answer) for answer in answers[start : start + 32]]
            found += forward(tokenizer.pad(batch, return_tensors="pt"))
        return found

    lengths = [len(encode(tokenizer, PROMPT, answer)["input_ids"]) for answer in answers]
    one = round(statistics.mean(lengths))
    size = max(1, model._batches._max_tokens // one)
    ids = torch.randint(10, len(tokenizer), (len(answers), one), generator=torch.Generator().manual_seed(0))

    def ideal() -> list[float]:
        return [v for batch in ids.split(size) for v in forward({"input_ids": batch, "attention_mask": torch.ones_like(batch)})]

    return {"rc_ray": ours, "row by row": row_by_row, "arrival": arrival, "ideal": ideal}


def padding(model: Any, answers: list[str]) -> tuple[float, float]:
    """Share of padded tokens that are padding: here, and in batches of 32 in the order of arrival."""
    from rc_ray.rewards.encoding import encode

    before = model.figures()
    model.score([PROMPT] * len(answers), answers)
    real, padded = (model.figures()[name] - before[name] for name in ("num_tokens", "num_padded_tokens"))
    lengths = [len(encode(model.tokenizer, PROMPT, answer)["input_ids"]) for answer in answers]
    arrival = [lengths[start : start + 32] for start in range(0, len(lengths), 32)]
    return 1 - real / padded, 1 - sum(lengths) / sum(len(b) * max(b) for b in arrival)


def in_vllm(path: str, prompts: list[Any], answers: list[str]) -> tuple[list[float], float, dict[str, int]]:
    """Rewards, seconds and figures; the engine is loaded by the first call."""
    from rc_ray.config import ClassifierReward
    from rc_ray.rewards.base import build_reward

    if not VLLM:
        config = ClassifierReward(kind="classifier", model=path, dtype="float32", engine="vllm")
        VLLM.append(build_reward(config, on_gpu=False, num_threads=os.cpu_count() or 1))
    before, start = VLLM[0].figures(), time.perf_counter()
    scores = VLLM[0].score(prompts, answers)
    seconds = time.perf_counter() - start
    return [s.value for s in scores], seconds, {k: n - before[k] for k, n in VLLM[0].figures().items()}


def engines(results: Any, name: str, path: str, model: Any, rounds: int) -> bool:
    """Compares the engines; returns whether rewards are equal to those row by row."""
    import torch

    from rc_ray.rewards.encoding import encode

    number = 4 if results.quick else 24
    draws = range(
        rounds + 1
    )  # other texts in each round, so that nothing is cached from the one before; the first one warms up
    contents = texts_of(model.tokenizer, PROMPT_LENGTHS, number * len(draws))
    answers = texts_of(model.tokenizer, LENGTHS["mixed"], number * NUM_ANSWERS)
    seconds: dict[str, list[float]] = {"rc_ray": [], "vllm": []}
    worst, figures = {"rc_ray": 0.0, "vllm": 0.0}, {}
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        for draw in draws:
            prompts = [
                [{"role": "user", "content": content}]
                for content in contents[draw * number : (draw + 1) * number]
                for _ in range(NUM_ANSWERS)
            ]
            start = time.perf_counter()
            ours = [score.value for score in model.score(prompts, answers)]
            took = time.perf_counter() - start
            theirs, in_engine, figures = process.submit(in_vllm, path, prompts, answers).result()
            with torch.inference_mode():
                for prompt, answer, *both in zip(prompts, answers, ours, theirs, strict=True):
                    inputs = {key: torch.tensor([value]) for key, value in encode(model.tokenizer, prompt, answer).items()}
                    alone = model.model(**inputs).logits[0, 0].item()
                    for who, value in zip(worst, both, strict=True):
                        worst[who] = max(worst[who], abs(value - alone))
            if draw:
                seconds["rc_ray"].append(took)
                seconds["vllm"].append(in_engine)
    results.numbers[f"{name}, engines"] = {**seconds, "figures": figures}
    share = figures["num_cached_tokens"] / figures["num_tokens"]
    print(f"\n{name}: {NUM_ANSWERS} answers to each of {number} prompts, {figures['num_tokens']} tokens")
    print(f"      vllm takes {share:.1%} of the tokens from the prefix cache")
    print(f"      vllm is faster than transformers by {spread(ratios(seconds['rc_ray'], seconds['vllm']))}")
    for who, value in worst.items():
        results.bar(value <= 1e-4, f"{name}, {who}: rewards equal those of the plain network row by row to 1e-4: {value:.1e}")
    return max(worst.values()) <= 1e-4


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="models; default: all")
    options, output, results, rounds = begin_rounds(__doc__, parser)
    from rc_ray.config import ClassifierReward
    from rc_ray.rewards.classifier import ClassifierRewardModel
    from tests.conftest import make_llama

    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        }
        make = {
            "MiniLM": lambda: classifier(Path(folder), 0),
            "tiny Llama": lambda: make_llama(Path(folder) / "llama", 0, 1, **sizes),
        }
        for name in options.only:
            path = make[name]()
            config = ClassifierReward(kind="classifier", model=str(path), dtype="float32")
            model = ClassifierRewardModel(config, on_gpu=False, num_threads=os.cpu_count() or 1)
            for case, lengths in LENGTHS.items():
                answers = texts_of(model.tokenizer, lengths, 48 if options.quick else 256)
                seconds: dict[str, list[float]] = {}
                rewards: dict[str, list[float]] = {}
                asked = competitors(model, answers)
                for number in range(rounds + 1):  # the first one warms up
                    for who, ask in asked.items():
                        start = time.perf_counter()
                        rewards[who] = ask()
                        if number:
                            seconds.setdefault(who, []).append(time.perf_counter() - start)
                results.numbers[f"{name}, {case}"] = seconds
                ours, theirs = padding(model, answers)
                print(f"\n{name}, {case} answers: {len(answers)}; padding {ours:.1%}, in the order of arrival {theirs:.1%}")
                worst = max(abs(a - b) for a, b in zip(rewards["rc_ray"], rewards["row by row"], strict=True))
                results.bar(worst <= 1e-4, f"{name}, {case}: rewards equal those row by row to 1e-4: {worst:.1e}")
                wrong += [case] if worst > 1e-4 else []
                against = {who: ratios(values, seconds["rc_ray"]) for who, values in seconds.items()}
                results.bar(
                    statistics.median(against["ideal"]) >= 0.9,
                    f"{name}, {case}: >= 0.9 of the ideal bound: {spread(against['ideal'])}",
                )
                for who in ("row by row", "arrival"):
                    results.bar(
                        statistics.median(against[who]) > 1, f"{name}, {case}: faster than {who}: {spread(against[who])}"
                    )
            wrong += [] if engines(results, name, str(path), model, rounds) else [f"{name}, engines"]
    return results.finish("bench_rewards", output) or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
