"""The commands on tiny random models, end to end: in processes of their own where that makes a difference."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_stand_ins import Ran

import fresh_python

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import torch  # noqa: E402

from eckart.moments import Moments  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "110"}
COMMAND = fresh_python.RUN_MODULE.format(name="eckart")


def eckart(*arguments: object, launcher: tuple[str, ...] = ()) -> Ran:
    """The command in a process of its own, or in those that the launcher starts."""
    if launcher:
        command = [sys.executable, "-m", *launcher, "-m", "eckart", *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    else:
        ran = fresh_python.run(COMMAND, *arguments, env=ENVIRONMENT)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random Llama of two blocks with byte tokens."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A random BERT without a head: an embedding model."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Enough lines of text, in a file."""
    file = tmp_path_factory.mktemp("data") / "texts.txt"
    file.write_text("\n".join(f"Sentence number {n} says that {n * n} is a square." for n in range(400)))
    return file


SHORT = ("--samples", "24", "--length", "32")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_from_calibration_to_export(request, run, family, texts, tmp_path):
    start = eckart if family == "llama" else run
    model = request.getfixturevalue(family)
    moments, plan = tmp_path / "moments.safetensors", tmp_path / "plan.json"
    small, dense = tmp_path / "small", tmp_path / "dense"

    ran = start("calibrate", model, "--data", texts, "-o", moments, *SHORT, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["sites"]

    ran = start("plan", model, "--moments", moments, "--keep", "0.6", "-o", plan, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["plan"] == json.loads(plan.read_text())

    ran = start("compress", model, "--moments", moments, "--plan", plan, "-o", small, "--json")
    assert ran.code == 0, ran.err
    outcome = json.loads(ran.out)["outcome"]
    share = outcome["sites_after"]["parameters"] / outcome["sites_before"]["parameters"]
    assert 0.4 < share <= 0.6
    for name in ("config.json", "eckart.json", "README.md", "report.html"):
        assert (small / name).is_file()

    ran = start("doctor", small, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["whole"] is True

    ran = start("evaluate", small, "--against", model, "--data", texts, *SHORT, "--no-latency", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["evaluation"]["metrics"]

    ran = start("export", small, "--to", "dense", "-o", dense)
    assert ran.code == 0, ran.err
    assert "save nothing" in ran.err
    loaded = transformers.AutoModel.from_pretrained(dense)
    assert sum(p.numel() for p in loaded.parameters()) > 0


def test_compress_in_one_command_and_what_it_refuses_afterwards(run, llama, bert, texts, tmp_path):
    small = tmp_path / "small"
    ran = run("compress", llama, "--data", texts, *SHORT, "--max-bytes", "110kB", "-o", small)
    assert ran.code == 0, ran.err
    assert str(small) in ran.out
    weights = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    assert weights < 130_000

    before = {file.name: file.read_bytes() for file in small.iterdir()}
    for arguments, code, words in (
        ((llama, "--data", texts, "--keep", ".5", "-o", small), 2, "--overwrite"),
        ((bert, "--plan", tmp_path / "plan.json", "--data", texts, "-o", tmp_path / "x"), 2, "model"),
        ((llama, "--data", texts, "--max-bytes", "9kB", "-o", tmp_path / "x"), 2, "cannot be met"),
        ((llama, "--data", texts, "--keep", ".5", "--include", "q_prj", "-o", tmp_path / "x"), 2, "q_proj"),
        ((llama, "--data", texts, "--keep", ".5", "--method", "kfca", "-o", tmp_path / "x"), 2, "kfac"),
        ((tmp_path / "no" / "model", "--data", texts, "--keep", ".5", "-o", tmp_path / "x"), (1, 2), "model"),
    ):
        if "--plan" in arguments:
            made = run("plan", llama, "--method", "svd", "--keep", ".5", "-o", arguments[2])
            assert made.code == 0, made.err
        ran = run("compress", *arguments, *SHORT)
        assert ran.code in (code if isinstance(code, tuple) else (code,)), ran.err
        assert words in ran.err
        assert "Traceback" not in ran.err
        assert ran.out == ""
        assert not (tmp_path / "x").exists()
    assert {file.name: file.read_bytes() for file in small.iterdir()} == before


def test_a_dry_run_of_each(run, llama, texts, tmp_path):
    for arguments in (
        ("compress", llama, "--data", texts, "--keep", "0.5"),
        ("calibrate", llama, "--data", texts),
        ("plan", llama, "--method", "svd", "--keep", "0.5"),
    ):
        ran = run(*arguments, "--dry-run")
        assert ran.code == 0, ran.err
        assert "peak memory" in ran.out
        ran = run(*arguments, "--dry-run", "--json")
        assert json.loads(ran.out)["peak_memory_bytes"] > 0


def test_two_processes_write_one_file_and_the_same_moments(llama, texts, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    quick = (llama, "--data", texts, "--samples", "32", "--length", "32", "--gradients", "none", "--json")
    ran = eckart("calibrate", *quick, "-o", one)
    assert ran.code == 0, ran.err
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ran = eckart("calibrate", *quick, "-o", two, launcher=launcher)
    assert ran.code == 0, ran.err
    payload = json.loads(ran.out)
    assert payload["moments"] == str(two)

    first, second = Moments.load(one), Moments.load(two)
    assert first.names() == second.names()
    for name in first.names():
        torch.testing.assert_close(first.site(name).second, second.site(name).second, rtol=1e-9, atol=1e-12)


def test_an_interrupt_leaves_nothing(llama, tmp_path):
    out = tmp_path / "small"
    command = [sys.executable, "-m", "eckart", "compress", str(llama), "--data", "stdlib:source"]
    command += ["--samples", "100000", "--length", "32", "--batch-size", "1", "--keep", ".5", "-o", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell without job control lets background jobs ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), stderr  # which shells report alike
    assert f"{out} was not written" in stderr
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []
