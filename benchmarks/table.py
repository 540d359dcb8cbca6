"""How a benchmark measures time and memory, and where its numbers go: a table in README.md and a file of results."""

import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def wait() -> None:
    "Until a GPU that has been used has done its work."
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(run: Callable) -> tuple[float, float]:
    "Wall-clock and processor seconds of `run()`; processor time does not count what busy neighbours took."
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    kept = run()
    wait()
    spent = time.perf_counter() - wall, time.process_time() - cpu
    del kept  # freed after the clock
    return spent


def in_turns(plain: Callable, arms: dict[str, Callable], repeats: int) -> dict[str, dict]:
    """Each arm between two plain runs, `repeats` times after a round that is not counted; medians of seconds and of
    ratios by arm."""
    pairs = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        before = seconds(plain)
        for name, arm in arms.items():
            during, after = seconds(arm), seconds(plain)
            if repeat:
                pairs[name].append([(d, (b + a) / 2) for d, b, a in zip(during, before, after)])
            before = after
    found = {}
    for name, both in pairs.items():
        wall, cpu = zip(*both)
        found[name] = {
            "plain_s": statistics.median(b for _, b in wall),
            "arm_s": statistics.median(a for a, _ in wall),
            "ratio": statistics.median(a / b for a, b in wall),
            "cpu_ratio": statistics.median(a / b for a, b in cpu),
            "ratios": [a / b for a, b in wall],
            "cpu_ratios": [a / b for a, b in cpu],
        }
        print(
            f"{name}: ratios {[round(r, 3) for r in found[name]['ratios']]}, "
            f"of processor time {[round(r, 3) for r in found[name]['cpu_ratios']]}",
            flush=True,
        )
    return found


def peak_megabytes() -> float:
    "Largest resident memory of this process since `forget_peak`, or since its start."
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_own_process(file: str, *arguments: str) -> dict:
    "What the benchmark `file` prints last, as JSON, when it runs with these arguments in a process of its own."
    out = subprocess.run([sys.executable, file, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def within(chapter, model, arm: Callable, repeats: int = 5) -> float:
    """Median over runs of: all of `arm()`, over the part of the same run that is the model's own forward pass.

    A run is compared with itself, so a change of the machine's speed between two runs has no effect. `chapter` is the
    module whose `attach` sets the hooks."""
    hooks, forward, found = [0.0], [0.0], []
    attach, model_forward = chapter.attach, model.forward

    def clocked(spent, function):
        @functools.wraps(function)  # also its signature, which `capture` reads
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return run

    chapter.attach = lambda sites, function, *checked: attach(sites, clocked(hooks, function), *checked)
    model.forward = clocked(forward, model_forward)
    try:
        for _ in range(repeats):
            hooks[0] = forward[0] = 0.0
            wall, _ = seconds(arm)
            found.append(wall / (forward[0] - hooks[0]))
    finally:
        chapter.attach = attach
        del model.forward  # the class's own again
    return statistics.median(found)


def publish(name: str, head: list[str], rows: list[list], note: str, results: dict) -> None:
    """Print a Markdown table with a note on the machine, put it between <!-- name --> and <!-- /name --> of README.md,
    and write results/name.json."""
    import torch

    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = found.group(1) if found else processor
    machine = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    about = (
        f"{note} {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python']}."
    )
    table = "\n".join([*lines, "", about])
    print(f"\n{table}\n")
    readme = HERE / "README.md"
    text, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{table}\n{m[2]}", readme.read_text(), flags=re.S
    )
    if count != 1:
        raise SystemExit(f"{readme} has {count} places marked <!-- {name} --> ... <!-- /{name} -->; expected 1.")
    readme.write_text(text)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")
