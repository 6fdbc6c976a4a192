"""A LoRA instead of the whole policy: merged or by itself; the card, the curves, fewer workers than asked for, and one that dies."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.integration.conftest import preference, train

LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}


def kill_a_worker_at(record: Path, checkpoint: str, killed: list[int]) -> None:
    """SIGKILL of the one training worker when Ray Train's record names this checkpoint."""
    deadline = time.monotonic() + 240
    while not (record.exists() and checkpoint in record.read_text()):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "TrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)


def test_a_merged_lora_is_the_policy_with_the_lora_by_itself(
    tiny_policy: Path, objective_pairs: Path, tmp_path: Path, board: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    alone, merged = tmp_path / "alone", tmp_path / "merged"
    undisturbed = train(tiny_policy, objective_pairs, alone, board, **LORA, merge_adapter=False)
    assert undisturbed["remarks"] == []
    # The cluster has no room for two workers of this size: it starts with one, and the batches stay the same, also when it dies on its way.
    killed: list[int] = []
    record = merged / "work" / "dpo" / "checkpoint_manager_snapshot.json"
    killer = threading.Thread(target=kill_a_worker_at, args=(record, "step-000003", killed))
    killer.start()
    facts = train(tiny_policy, objective_pairs, merged, board, num_cpus=5.0, **LORA, min_workers=1, save_every_steps=1)
    killer.join()
    assert len(killed) == 1
    # Each step is taken once, as the worker that finished saw it.
    assert [entry["step"] for entry in facts["log_history"] if "loss" in entry] == list(range(1, facts["steps"] + 1))

    adapter = json.loads((alone / "model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (4, str(tiny_policy))
    assert "lm_head" not in adapter["target_modules"]
    assert not list((alone / "model").glob("model*.safetensors"))
    assert not list((merged / "model").glob("adapter*"))
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    expected = PeftModel.from_pretrained(policy, str(alone / "model")).merge_and_unload().state_dict()
    found = load_file(merged / "model" / "model.safetensors")
    before = load_file(tiny_policy / "model.safetensors")
    assert found.keys() == before.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-5) for name in found)
    changed = {name.split(".")[-2] for name in found if not torch.equal(found[name], before[name])}
    assert changed == {name.split(".")[-1] for name in adapter["target_modules"]}
    assert preference(merged / "model") > preference(tiny_policy) + 0.1

    for folder, library in ((alone, "peft"), (merged, "transformers")):
        card = (folder / "model" / "README.md").read_text()
        assert f"library_name: {library}" in card
        assert f"`{undisturbed['data_fingerprint']}`" in card
        assert "| lora_rank | `4` (set) |" in card
        assert list((folder / "model" / "runs").glob("events.out.tfevents.*"))
        assert not (folder / "work").exists()
    assert not list((merged / "model").glob("*.bin")), "nothing pickled"
