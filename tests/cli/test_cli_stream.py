"""``eckart compress --stream`` in processes of their own, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import torch  # noqa: E402

from fresh_python import RUN_MODULE, Fresh  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "110"}
COMMAND = RUN_MODULE.format(name="eckart")
WORK = ".small.stream"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A random Llama of six blocks in ``llama`` and some text beside it."""
    root = tmp_path_factory.mktemp("stream")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(root / "llama", max_shard_size="500KB")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(root / "llama")
    (root / "texts.txt").write_text("\n".join(f"Sentence {n} says that {n * n} is a square." for n in range(300)))
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes, since sums round differently with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(place: Path) -> list[str]:
    asked = ["--data", str(place / "texts.txt"), "--samples", "32", "--length", "32", "--keep", ".6", "-o", "small"]
    return ["compress", str(place / "llama"), "--stream", *asked]


def start(folder: Path, place: Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "eckart", *arguments(place)],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control lets background jobs ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(process: subprocess.Popen[str] | Fresh, file: Path) -> None:
    """Wait until the process has written a file."""
    end = time.monotonic() + 300
    while not file.exists():
        assert not ended(process), process.communicate()
        assert time.monotonic() < end
        time.sleep(0.001)


def ended(process: subprocess.Popen[str] | Fresh) -> bool:
    try:
        process.wait(0)
    except subprocess.TimeoutExpired:
        return False
    return True


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_sigkill_at_several_points_and_the_same_bytes(place, run, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    monkeypatch.chdir(whole)
    ran = run(*arguments(place))
    assert ran.code == 0, ran.err
    assert "saved to small" in ran.out

    for name in ("inputs-0003", "block-0003-002", "model/model-00003-of-00007"):
        process = Fresh(COMMAND, *arguments(place), env=ENVIRONMENT, cwd=killed)
        until(process, killed / WORK / f"{name}.safetensors")
        process.kill()
        assert process.returncode == -signal.SIGKILL
        assert [path.name for path in killed.iterdir() if not path.name.endswith(".lock")] == [WORK]
    monkeypatch.chdir(killed)
    ran = run(*arguments(place))
    assert ran.code == 0, ran.err
    assert "went on" in ran.err
    assert contents(killed / "small") == contents(whole / "small")
    assert [path.name for path in killed.iterdir()] == ["small"]
    transformers.AutoModelForCausalLM.from_pretrained(killed / "small")


def test_ctrl_c_says_how_to_go_on_and_a_second_run_is_kept_out(place, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start(tmp_path, place)
    until(process, tmp_path / WORK / "block-0005-000.safetensors")
    process.send_signal(signal.SIGSTOP)
    ran = run(*arguments(place))
    assert ran.code == 1
    assert "another run" in ran.err
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "the same command goes on from there" in err
    assert out == ""

    ran = run(*arguments(place), "--seed", "3")
    assert ran.code == 2
    assert "seed: 0 then, 3 now" in ran.err
    assert "start over" in ran.err

    ran = run(*arguments(place), "--json")
    assert ran.code == 0, ran.err
    payload = json.loads(ran.out)
    assert payload["resumed"] is True
    assert payload["outcome"]["sites_after"]["parameters"] <= 0.6 * payload["outcome"]["sites_before"]["parameters"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--plan", "plan.json"), "--stream and --plan"),
        (("--moments", "moments.safetensors", "--keep", ".6"), "--stream and --moments"),
        (("--data", "stdlib:source", "--keep", ".6", "--dtype", "float32"), "--stream and --dtype"),
        (("--data", "stdlib:source", "--keep", ".6", "--device", "cuda"), "--stream and --device"),
        (("--data", "stdlib:source", "--keep", ".6", "--head", "--embeddings"), "--stream and --head"),
        (("--data", "stdlib:source", "--keep", ".6", "--dry-run"), "--stream and --dry-run"),
        (("--data", "stdlib:source", "--keep", ".6", "--refit-blend", "0"), "--stream and --refit-blend"),
    ],
)
def test_what_excludes_streaming(asked, words, run, verbs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plan.json", "moments.safetensors"):
        (tmp_path / name).write_text("{}")
    ran = run("compress", "m", "--stream", "-o", "small", *asked)
    assert ran.code == 2
    assert words in ran.err
    assert verbs.calls == []
