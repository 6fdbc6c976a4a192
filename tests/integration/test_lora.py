"""A LoRA instead of the whole policy: merged or by itself; the card, the curves, and fewer workers than asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.integration.conftest import preference, train

LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}


def test_a_merged_lora_is_the_policy_with_the_lora_by_itself(
    tiny_policy: Path, objective_pairs: Path, tmp_path: Path, board: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    alone, merged = tmp_path / "alone", tmp_path / "merged"
    facts = train(tiny_policy, objective_pairs, alone, board, **LORA, merge_adapter=False)
    assert facts["remarks"] == []
    # The cluster has no room for two workers of this size: it starts with one, and the batches stay the same.
    train(tiny_policy, objective_pairs, merged, board, num_cpus=5.0, **LORA, min_workers=1)

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
        assert f"`{facts['data_fingerprint']}`" in card
        assert "| lora_rank | `4` (set) |" in card
        assert list((folder / "model" / "runs").glob("events.out.tfevents.*"))
        assert not (folder / "work").exists()
    assert not list((merged / "model").glob("*.bin")), "nothing pickled"
