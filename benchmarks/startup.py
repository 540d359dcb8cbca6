"""How long until the command answers, and what does an import load?"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from table import publish

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    beside = Path(sys.executable).parent / "llmfact"
    llmfact = str(beside) if beside.exists() else shutil.which("llmfact")
    if llmfact is None:
        raise SystemExit("there is no command llmfact beside this Python; install the package first (make run does).")
    commands = {
        "an empty Python": [sys.executable, "-c", ""],
        "`import llmfact_nb`": [sys.executable, "-c", "import llmfact_nb"],
        "`llmfact --help`": [llmfact, "--help"],
    }
    times = {name: [] for name in commands}
    for repeat in range(args.repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            if repeat:  # the first fills the file cache
                times[name].append(time.perf_counter() - start)
    heavy = "[m for m in ('torch', 'numpy', 'transformers', 'sklearn', 'pandas', 'matplotlib') if m in sys.modules]"
    loaded = {
        "`import llmfact_nb`": subprocess.run(
            [sys.executable, "-c", f"import sys, llmfact_nb; print(*{heavy})"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(),
        "`llmfact --help`": subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.argv[1:] = ['--help']\nfrom llmfact_nb.cli import main\n"
                f"try: main()\nexcept SystemExit: print('loaded', *{heavy})",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        .stdout.split("loaded")[-1]
        .split(),
    }
    bars = {"`llmfact --help`": "0.70 s", "`import llmfact_nb`": "no torch"}
    rows = [
        [
            name,
            f"{statistics.median(t):.2f} s",
            f"{min(t):.2f} to {max(t):.2f} s",
            ", ".join(loaded[name]) or "none" if name in loaded else "",
            bars.get(name, ""),
        ]
        for name, t in times.items()
    ]
    note = f"Median and range of {args.repeats} fresh processes, files cached."
    publish(
        "startup",
        ["command", "time", "range", "heavy packages loaded", "bar"],
        rows,
        note,
        {"arguments": vars(args), "seconds": times, "loaded": loaded},
    )
