"""Held-out accuracy of `rc-ray train-reward` from MiniLM on real preference pairs (hh-rlhf, helpful and harmless).

    python tests/benchmarks/bench_reward_model.py [--data ../shared/data/hh-rlhf/dsp-cleaned]

Trains on 900 pairs and tests on at least 1,400 others, split by prompt, once per objective. Accuracy is printed with its 95 %
interval, beside the rule "the longer answer is better"; exits with 1 when an accuracy is below 0.59.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from rc_ray.ledger.rundir import versions
from rc_ray.training.reward_model import RewardTrainingOptions, train_reward

ROOT = Path(__file__).parent.parent.parent
# 1,450 asked for: pairs whose answer alone is longer than max_length are left out of the test too.
OPTIONS = RewardTrainingOptions(num_train=900, num_test=1450, num_epochs=1.0)
TARGET = 0.59


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hh-rlhf" / "dsp-cleaned")
    data = parser.parse_args().data
    print(f"{platform.processor() or platform.machine()}, {json.dumps(versions())}")
    reached = True
    for objective in ("helpful", "harmless"):
        with tempfile.TemporaryDirectory() as folder:
            result = train_reward(str(data / f"{objective}.test.json"), f"{folder}/model", OPTIONS)
        reached &= result.accuracy >= TARGET and result.num_test >= 1400
        print(
            f"{objective}: accuracy {result.accuracy:.3f} [{result.accuracy_low:.3f}, {result.accuracy_high:.3f}] on {result.num_test} pairs "
            f"(trained on {result.num_train}, {result.seconds:.0f}s); the longer answer alone: {result.length_accuracy:.3f}",
            flush=True,
        )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
