"""What a policy is wrapped in: FSDP2 and DeepSpeed on two CPU workers, nothing on one. accelerate shards only where it sees GPUs, so workers here are told that it
does; all else is as it would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import train

ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
OPTIONS = {"num_epochs": 1, "dtype": "float32", "save_every_steps": 4}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the package deepspeed is not installed")


def worker_on_cpus(folder: Path) -> Callable[[dict[str, Any]], None]:
    """A training worker that can be sharded on CPUs and that is killed twice: in step 6 of 6 ("middle"), and before it writes the policy ("end").

    A file of the moment's name in `folder` says that it has been.
    """

    def worker(loop_config: dict[str, Any]) -> None:
        import os
        import signal

        from accelerate.state import PartialState
        from accelerate.utils import DistributedType
        from torch.distributed.tensor import DTensor

        from rc_ray.training import dpo, policy, trainer

        os.environ["DS_ACCELERATOR"] = "cpu"
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
        config_as_it_is, write_as_it_is = dpo.dpo_config, policy.write_policy
        step_as_it_is = trainer.ReferenceDPOTrainer.training_step

        def die(moment: str) -> None:
            if not (folder / moment).exists():
                torch.distributed.barrier()
                (folder / moment).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def dpo_config(task: Any, place: Any) -> Any:
            made = config_as_it_is(replace(task, on_gpu=True), place)
            assert made.device.type == "cpu"
            if made.fsdp:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            return made

        def training_step(self: Any, *arguments: Any) -> Any:
            if self.state.global_step == 5:
                die("middle")
            return step_as_it_is(self, *arguments)

        def write_policy(made: Any, folder: Path) -> None:
            die("end")
            assert made.ref_model is None
            if made.is_fsdp_enabled:
                assert all(isinstance(parameter, DTensor) for parameter in made.model.parameters())
            else:
                assert made.is_deepspeed_enabled
            write_as_it_is(made, folder)

        dpo.dpo_config, policy.write_policy = dpo_config, write_policy
        trainer.ReferenceDPOTrainer.training_step = training_step
        dpo._worker(loop_config)

    return worker


@pytest.fixture(scope="module")
def whole(tiny_policy: Path, objective_pairs: Path, tmp_path_factory: pytest.TempPathFactory, board: Any) -> dict[str, Any]:
    """Facts and weights of a training in which every worker holds the whole policy."""
    folder = tmp_path_factory.mktemp("whole")
    facts = train(tiny_policy, objective_pairs, folder, board, **OPTIONS)
    return {"facts": facts, "weights": load_file(folder / "model" / "model.safetensors")}


@pytest.mark.parametrize(
    "trl",
    [
        {"fsdp": True, "fsdp_config": {"reshard_after_forward": True}},
        pytest.param({"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}}, marks=needs_deepspeed),
        pytest.param(
            {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}},
            marks=needs_deepspeed,
        ),
    ],
    ids=["fsdp", "zero2", "zero3"],
)
def test_a_sharded_policy_killed_twice_learns_what_a_whole_one_does(
    tiny_policy: Path, objective_pairs: Path, tmp_path: Path, board: Any, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any],
    trl: dict[str, Any],
) -> None:  # fmt: skip
    from rc_ray.training import dpo

    killed = tmp_path / "killed"
    killed.mkdir()
    monkeypatch.setattr(dpo, "check_training", lambda *_: None)
    monkeypatch.setattr(dpo, "_worker", worker_on_cpus(killed))
    facts = train(tiny_policy, objective_pairs, tmp_path, board, **OPTIONS, trl=trl, max_failures=2)
    assert {moment.name for moment in killed.iterdir()} == {"middle", "end"}
    losses = [[entry["loss"] for entry in each["log_history"] if "loss" in entry] for each in (whole["facts"], facts)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    # A weight that two names share is written under both.
    assert torch.equal(
        weights.pop("lm_head.weight", weights["model.embed_tokens.weight"]), weights["model.embed_tokens.weight"]
    )
    assert weights.keys() == whole["weights"].keys()
    assert all(torch.allclose(weights[name], whole["weights"][name], rtol=0, atol=1e-5) for name in weights)
    assert not [file.name for file in (tmp_path / "model").iterdir() if file.suffix in (".bin", ".pt", ".pth")]
    assert not (tmp_path / "model" / "trainer_state.json").exists()


def test_one_worker_trains_the_bare_policy(
    tiny_policy: Path, objective_pairs: Path, tmp_path: Path, board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rc_ray.training import dpo

    def worker(loop_config: dict[str, Any]) -> None:
        from rc_ray.training import dpo, trainer

        step_as_it_is = trainer.ReferenceDPOTrainer.training_step

        def training_step(self: Any, model: Any, *arguments: Any) -> Any:
            assert model is self.model, f"wrapped in {type(model).__name__}"
            return step_as_it_is(self, model, *arguments)

        trainer.ReferenceDPOTrainer.training_step = training_step
        dpo._worker(loop_config)

    monkeypatch.setattr(dpo, "_worker", worker)
    facts = train(tiny_policy, objective_pairs, tmp_path, board, **OPTIONS, num_workers=1)
    assert facts["log_history"]
    assert (tmp_path / "model" / "model.safetensors").exists()
