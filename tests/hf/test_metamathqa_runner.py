"""benchmarks/metamathqa.py: its file has the keys of PEFT's comparison, and its answers are read as there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("datasets")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "metamathqa.py"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# huggingface/peft, method_comparison/MetaMathQA/results, since accelerators of all kinds are served.
KEYS = {
    "run_info": {
        *("created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"),
    },
    "train_info": {
        *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"),
        *("train_time", "file_size", "num_trainable_params", "num_total_params", "status", "metrics"),
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}
TRAIN_CONFIG = {
    *("model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile"),
    *("query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp"),
    *("autocast_adapter_dtype", "generation_kwargs", "attn_implementation"),
}
VALID = {
    *("step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec"),
    *("mem allocated avg", "mem reserved avg", "elapsed time"),
}
TEST = {"step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("metamathqa_runner", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def place(tmp_path) -> Path:
    torch.manual_seed(0)
    letters = {chr(i): i for i in range(32, 127)} | {"<eos>": 1, "<unk>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=127,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    rows = [{"query": f"What is {i} + 1?", "response": f"One more. The answer is: {i + 1}"} for i in range(24)]
    for name, some in (("train", rows), ("valid", rows[:2]), ("test", rows[2:5])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    (tmp_path / "wiki.jsonl").write_text(json.dumps({"text": "A page of words."}))
    return tmp_path


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_the_file_has_the_keys_of_the_comparison(script, place, method):
    small = {"max_steps": 4, "eval_steps": 2, "batch_size": 3, "batch_size_eval": 2, "dtype": "float32"}
    small |= {"max_seq_length": 96, "generation_kwargs": {"max_length": 90, "max_new_tokens": 4}}
    settings = [word for name, value in small.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    out = place / "result.json"
    script.main(
        [method, "--rank", "2", "--model", str(place / "model"), "--data", str(place), *settings, "-o", str(out)]
    )
    found = json.loads(out.read_text())
    assert {name: set(found[name]) for name in found} == KEYS
    assert set(found["run_info"]["train_config"]) >= TRAIN_CONFIG
    info = found["train_info"]
    assert info["status"] == "success"
    assert [set(row) for row in info["metrics"]] == [VALID, VALID, TEST]
    assert info["metrics"][-1]["train samples"] == 12
    assert 0 < info["num_trainable_params"] < info["num_total_params"]
    assert info["file_size"] > 0
    assert found["run_info"]["peft_config"]["method"] == method
    assert {"sha", "created_at"} == set(found["meta_info"]["model_info"])
    assert set(found["meta_info"]["dataset_info"]) == {"metamath", "gsm8k"}
    assert {"system", "release", "version", "machine", "processor", "accelerator"} == set(
        found["meta_info"]["system_info"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so $4^2 = \\boxed{16}$.The answer is: 16", 16.0),
        ("#### 1/4", 0.25),
        ("The answer is 12%.\n\nQuestion: more", 12.0),
        ("The answer is: x^2", "x^2"),
        ("no answer", None),
        ("The answer is: 3. The answer is: 5", 5.0),
    ],
)
def test_answers(script, text, expected):
    assert script.answer(text) == expected
