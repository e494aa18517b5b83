"""One run of PEFT's MetaMathQA comparison with a method of Eckart, as a result file in that comparison's own schema.

    python benchmarks/metamathqa.py pissa --rank 32 --targets q_proj v_proj -o result.json

For people with a GPU: Llama-3.2-3B in bfloat16 is trained for 5,000 steps of 4 examples of MetaMathQA and answers the
1,319 questions of GSM8K's test set; `forgetting` is the rise of its loss on 100 pages of Wikipedia. Model and data come
from the hub (accept the model's terms first). Settings, order of steps, answer format and the names in the file follow
huggingface/peft, method_comparison/MetaMathQA, as of August 2026, so that the file can lie beside those in its
`results` folder. What differs: the tuner's own penalty is added to the loss and the tuner hears of every step, which
PEFT's script cannot know. Its board has one seed; with 1,319 questions the standard error of an accuracy is 1.4 points,
and differences below three points say nothing.

On a CPU it runs too, with --model and --data of your own (a folder with train.jsonl, valid.jsonl, test.jsonl with query
and response, and wiki.jsonl with text), which is how it is tested; such figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, DivisionByZero, InvalidOperation
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy
import torch
import transformers
from peft import get_peft_model
from torch.nn.functional import cross_entropy

import eckart
from eckart.hf.adapters.tuner import after_step, penalty

SETTINGS: dict[str, Any] = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "attn_implementation": None,
    "init_kv_cache_prefix": None,
}
"""The comparison's defaults, under its names."""
LONGEST, VALID, PAGES, BUCKET, WARM_UP = 1300, 50, 100, 20, 0.1
"""Characters of an example at most; questions of the validation; pages; batches that are sorted together; share of
steps in which the learning rate rises."""
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
Examples = Sequence[Mapping[str, str]]


def data_of(folder: Path | None) -> tuple[dict[str, Examples], list[str], dict[str, Any]]:
    """Train, valid and test examples (query, response), pages of text, and what the data sets are."""
    if folder is not None:
        parts = {
            name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in ("train", "valid", "test", "wiki")
        }
        pages = [row["text"] for row in parts.pop("wiki")]
        return parts, pages, {name: {"sha": None, "created_at": None} for name in ("metamath", "gsm8k")}
    metamath = datasets.load_dataset("meta-math/MetaMathQA")["train"]
    gsm8k = datasets.load_dataset("openai/gsm8k", "main").rename_columns({"question": "query", "answer": "response"})
    state = numpy.random.RandomState(0)  # the comparison draws its validation set with it
    order = numpy.arange(len(gsm8k["train"]))
    state.shuffle(order)
    found: dict[str, Examples] = {
        "train": [row for row in metamath if len(f"{row['query']} {row['response']}") <= LONGEST],
        "valid": list(gsm8k["train"].select(order[:VALID])),
        "test": list(gsm8k["test"]),
    }
    wiki = datasets.load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True).take(PAGES)
    about = {"metamath": _about("dataset", "meta-math/MetaMathQA"), "gsm8k": _about("dataset", "openai/gsm8k")}
    return found, [row["text"] for row in wiki], about


def _about(kind: str, name: str) -> dict[str, Any]:
    """Commit and date of something on the hub; None where it cannot be asked."""
    try:
        found = getattr(huggingface_hub.HfApi(), f"{kind}_info")(name)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        warnings.warn(f"the hub says nothing of {name}: {error}", stacklevel=2)
        return {"sha": None, "created_at": None}
    return {"sha": found.sha, "created_at": found.created_at.isoformat()}


def answer(text: str) -> str | float | None:
    """What follows the last mark of an answer, as a number where it is one (also a fraction), else as text."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    words = text.rpartition(mark)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    try:
        above, stroke, below = words.partition("/")
        return float(Decimal(above.strip()) / (Decimal(below.strip()) if stroke else 1))
    except (DivisionByZero, InvalidOperation, ValueError):
        return words


class Memory:
    """Bytes that are allocated and reserved: of the accelerator, or of the process where there is none."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.start = self.reserved()

    def reserved(self) -> int:
        return torch.cuda.memory_reserved() if self.cuda else self.peak()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else self.peak()

    def peak(self) -> int:
        if self.cuda:
            return int(torch.cuda.max_memory_reserved())
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Run:
    """One training: what the comparison's file says of it."""

    def __init__(self, settings: Mapping[str, Any], config: eckart.AdapterConfig, folder: Path | None) -> None:
        self.settings, self.config = settings, config
        self.data, self.pages, self.about = data_of(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        transformers.set_seed(settings["seed"])
        self.memory = Memory(self.device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model_id"])
        self.tokenizer.model_max_length = settings["max_seq_length"]
        if not self.tokenizer.pad_token:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        base = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model_id"],
            dtype=getattr(torch, settings["dtype"]),
            attn_implementation=settings["attn_implementation"],
        ).to(self.device)
        self.model: Any = get_peft_model(base, config, autocast_adapter_dtype=settings["autocast_adapter_dtype"])
        self.metrics: list[dict[str, float]] = []
        self.reserved: list[int] = []
        self.status, self.error, self.seconds = "failed", "", 0.0

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        longest = self.settings["max_seq_length"]
        return [ids[:longest] for ids in self.tokenizer(list(texts))["input_ids"]]

    def batches(self) -> Iterator[list[list[int]]]:
        """Training batches: twenty at a time are sorted by length, the longest first."""
        size, template = self.settings["batch_size"], self.settings["query_template"]
        rows = self.data["train"]
        for start in range(0, len(rows), size * BUCKET):
            bucket = rows[start : start + size * BUCKET]
            texts = [template.format(query=row["query"]) + row["response"] for row in bucket]
            ids = sorted(self.tokens(texts), key=len, reverse=True)
            yield from (ids[i : i + size] for i in range(0, len(ids), size))

    def loss(self, rows: list[list[int]]) -> torch.Tensor:
        """Of one batch; of the padding only the first token counts, which ends the answer."""
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
        labels = batch["input_ids"].clone()
        for i, row in enumerate(rows):
            labels[i, len(row) + 1 :] = -100
        count = int(batch["attention_mask"].sum())
        found: torch.Tensor = self.model(**batch, labels=labels, num_items_in_batch=count).loss
        return found + penalty(self.model).to(found.device)

    @torch.inference_mode()
    def accuracy(self, rows: Examples) -> float:
        """Share of right answers."""
        self.model.eval()
        right = 0
        for start in range(0, len(rows), self.settings["batch_size_eval"]):
            some = rows[start : start + self.settings["batch_size_eval"]]
            ids = self.tokens([self.settings["query_template"].format(query=row["query"]) for row in some])
            batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left").to(self.device)
            limits = dict(self.settings["generation_kwargs"])
            if {"max_length", "max_new_tokens"} <= set(limits):  # the smaller of the two is meant
                length = batch["input_ids"].shape[1]
                limits["max_length"] = min(limits["max_length"], limits.pop("max_new_tokens") + length)
            texts = self.model.generate(**batch, **limits, pad_token_id=self.tokenizer.eos_token_id)
            for text, row in zip(self.tokenizer.batch_decode(texts, skip_special_tokens=True), some, strict=True):
                expected = answer(row["response"])
                right += expected is not None and answer(text) == expected
        self.model.train()
        return right / len(rows)

    @torch.inference_mode()
    def page_loss(self) -> float:
        """Mean loss per token of the pages, with the first token predicted from its own place, as in the comparison."""
        self.model.eval()
        losses: list[torch.Tensor] = []
        for page in self.pages:
            ids = torch.tensor([self.tokens([page])[0]], device=self.device)
            losses.append(cross_entropy(self.model(input_ids=ids).logits[0], ids[0], reduction="none").float().cpu())
        self.model.train()
        return float(torch.cat(losses).mean())

    def train(self) -> None:
        settings = self.settings
        start, evaluating = time.perf_counter(), 0.0
        optimizer = getattr(torch.optim, settings["optimizer_type"])(
            self.model.parameters(), **settings["optimizer_kwargs"]
        )
        steps, every = settings["max_steps"], settings["eval_steps"]
        scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)
        before = self.page_loss()
        losses: list[float] = []
        samples, durations, tokens, allocated = 0, [], [], []
        try:
            for step, rows in zip(range(1, steps + 1), self.batches(), strict=False):
                tick = time.perf_counter()
                optimizer.zero_grad()
                loss = self.loss(rows)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the loss is {float(loss)} at step {step}")
                torch.autograd.backward(loss)
                if settings["grad_norm_clip"]:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings["grad_norm_clip"])
                optimizer.step()
                scheduler.step()
                after_step(self.model, step)
                losses.append(float(loss.detach()))
                samples += len(rows)
                tokens.append(sum(map(len, rows)) + len(rows))
                allocated.append(self.memory.allocated() - self.memory.start)
                self.reserved.append(self.memory.reserved() - self.memory.start)
                durations.append(time.perf_counter() - tick)
                if step % every:
                    continue
                tick = time.perf_counter()
                accuracy = self.accuracy(self.data["valid"])
                evaluating += time.perf_counter() - tick
                self.metrics.append(
                    {
                        "step": step,
                        "valid accuracy": accuracy,
                        "train loss": statistics.fmean(losses[-every:]),
                        "train samples": samples,
                        "train time": sum(durations[-every:]),
                        "eval time": time.perf_counter() - tick,
                        "tokens / sec": sum(tokens[-every:]) / sum(durations[-every:]),
                        "mem allocated avg": statistics.fmean(allocated[-every:]),
                        "mem reserved avg": statistics.fmean(self.reserved[-every:]),
                        "elapsed time": time.perf_counter() - start,
                    }
                )
                print(json.dumps(self.metrics[-1]), flush=True)
            accuracy = self.accuracy(self.data["test"])
            self.metrics.append(
                {
                    "step": len(losses),
                    "test accuracy": accuracy,
                    "train loss": statistics.fmean(losses[-every:]),
                    "train samples": samples,
                    "train total tokens": sum(tokens),
                    "forgetting": self.page_loss() - before,
                }
            )
            self.status = "success"
        except KeyboardInterrupt:
            self.status, self.error = "canceled", "manually canceled"
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            self.status, self.error = "canceled", str(error)
        self.seconds = time.perf_counter() - start - evaluating

    def file_size(self) -> int:
        """Bytes of the saved adapter."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size

    def result(self, name: str, created: str, total: float) -> dict[str, Any]:
        """The file."""
        trained, all_of_them = self.model.get_nb_trainable_parameters()
        reserved = sorted(self.reserved) or [0]
        at = 0.99 * (len(reserved) - 1)
        low, high = reserved[math.floor(at)], reserved[math.ceil(at)]
        hub = not Path(self.settings["model_id"]).is_dir()
        return {
            "run_info": {
                "created_at": created,
                "total_time": total,
                "experiment_name": name,
                "peft_branch": "eckart",
                "train_config": dict(self.settings),
                "peft_config": json.loads(json.dumps(self.config.to_dict(), default=str)),
                "error_msg": self.error,
            },
            "train_info": {
                "accelerator_memory_reserved_avg": int(statistics.fmean(reserved)),
                "accelerator_memory_max": self.memory.peak() - self.memory.start,
                "accelerator_memory_reserved_99th": int(low + (at - math.floor(at)) * (high - low)),
                "train_time": self.seconds,
                "file_size": self.file_size(),
                "num_trainable_params": trained,
                "num_total_params": all_of_them,
                "status": self.status,
                "metrics": self.metrics,
            },
            "meta_info": {
                "model_info": _about("model", self.settings["model_id"]) if hub else {"sha": None, "created_at": None},
                "dataset_info": self.about,
                "package_info": packages(),
                "system_info": {
                    "system": platform.system(),
                    "release": platform.release(),
                    "version": platform.version(),
                    "machine": platform.machine(),
                    "processor": platform.processor(),
                    "accelerator": torch.cuda.get_device_name(0) if self.memory.cuda else "none",
                },
                "pytorch_info": torch.__config__.show(),
            },
        }


def packages() -> dict[str, str | None]:
    """Versions, and commits of those that are installed from a clone; Eckart's beside those of the comparison."""
    found: dict[str, str | None] = {}
    for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch", "eckart"):
        try:
            found[f"{name}-version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"{name}-version"] = None
        found[f"{name}-commit-hash"] = _commit(name)
    return found


def _commit(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or "site-packages" in spec.origin:
        return None
    ran = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(spec.origin).parent, capture_output=True, text=True, check=False
    )
    return ran.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--moments", help="file of eckart calibrate, for methods that start from inputs")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="one of the settings")
    parser.add_argument("--model", help="instead of Llama-3.2-3B")
    parser.add_argument("--data", type=Path, help="folder with files of your own, instead of the hub's")
    parser.add_argument("--name", help="of the experiment; by default eckart-METHOD/MODEL-rankR")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    changed = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in given.set)}
    if strange := set(changed) - set(SETTINGS):
        raise SystemExit(f"unknown settings {sorted(strange)}; known are {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **({"model_id": given.model} if given.model else {}), **changed}
    config = eckart.AdapterConfig(
        method=given.method,
        r=given.rank,
        target_modules=given.targets,
        task_type="CAUSAL_LM",
        seed=settings["seed"],
        options={k: json.loads(v) for k, v in (pair.split("=", 1) for pair in given.option)},
        moments=given.moments,
    )
    start = time.perf_counter()
    created = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    random.seed(settings["seed"])
    run = Run(settings, config, given.data)
    run.train()
    short = Path(settings["model_id"]).name.removeprefix("Meta-")
    name = given.name or f"eckart-{given.method}/{short[:1].lower()}{short[1:]}-rank{given.rank}"
    result = run.result(name, created, time.perf_counter() - start)
    given.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"{run.status}: {given.output}")
    return result


if __name__ == "__main__":
    main()
