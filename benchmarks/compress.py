"""CPU seconds of ``eckart compress`` of MiniLM, start of Python to finished folder.

python benchmarks/compress.py
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from eckart.verbs.demo import minilm_folder

TARGET = 60


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "eckart",
            "compress",
            str(minilm_folder()),
            "--data",
            "stdlib:docstrings",
        ]
        command += ["--keep", "0.6", "-o", f"{folder}/out", "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "target": TARGET}
    print(json.dumps(result, indent=2))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "compress.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
