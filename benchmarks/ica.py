"""How fast, how lean and how faithful is ICA here, beside scikit-learn, picard and nilearn on the same activations?
And how does it grow?"""

import argparse
import gc
import json
import math
import re
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from table import HERE, forget_peak, in_own_process, peak_megabytes, publish, seconds

from llmfact_nb.ica import ICA

HIDDEN, OUT = (("mlp_hidden", 4096, 64), ("mlp_out", 2048, 32))  # site, tokens, components
SPATIAL = ("mlp_out", 4096, 32)


def sklearn_default(X, k):
    from sklearn.decomposition import FastICA

    model = FastICA(k, random_state=0).fit(X)
    return dict(maps=model.mixing_.T, steps=model.n_iter_)


def picard_default(X, k):
    from picard import picard

    _, _, sources = picard(np.ascontiguousarray(X.T), n_components=k, random_state=0, max_iter=200, tol=1e-4)
    sources = sources / sources.std(1, keepdims=True)
    return dict(maps=sources @ (X - X.mean(0)) / len(X), steps=0)


def nilearn_canica(X, k):
    """CanICA's own decomposition of one matrix: randomized SVD, ten runs of FastICA with cube in float64, the sparsest
    run kept."""
    from nilearn.decomposition import CanICA

    model = CanICA(n_components=k, n_init=10, do_cca=False, threshold=None, random_state=0)
    model._raw_fit(X - X.mean(0))
    return dict(maps=model.components_, steps=0)


def ours(**settings):
    def run(X, k):
        found = ICA(k, **settings).fit(X)
        return dict(
            maps=found.maps_.numpy(),
            time=found.time_courses_.numpy(),
            steps=found.n_iter_,
            report=found.whitening_report_,
            stability=found.stability_.tolist(),
        )

    return run


CUBE = dict(kind="spatial", fun="cube", n_init=10)
# name -> (data, what is run, name of the baseline, bar on the ratio of times)
TASKS = {
    "temporal, scikit-learn FastICA": (HIDDEN, sklearn_default, None, None),
    "temporal, ICA": (HIDDEN, ours(), "temporal, scikit-learn FastICA", 15),
    "temporal, ICA, n_init=20": (HIDDEN, ours(n_init=20), "temporal, scikit-learn FastICA", 9),
    "temporal small, scikit-learn FastICA": (OUT, sklearn_default, None, None),
    "temporal small, picard": (OUT, picard_default, "temporal small, scikit-learn FastICA", None),
    "temporal small, ICA": (OUT, ours(), "temporal small, scikit-learn FastICA", 12),
    "temporal small, ICA, whiten_solver='gram'": (
        OUT,
        ours(whiten_solver="gram"),
        "temporal small, scikit-learn FastICA",
        None,
    ),
    "temporal small, ICA, n_init=20": (OUT, ours(n_init=20), "temporal small, scikit-learn FastICA", None),
    "spatial, 10 starts, cube, nilearn CanICA": (SPATIAL, nilearn_canica, None, None),
    "spatial, 10 starts, cube, ICA": (SPATIAL, ours(**CUBE), "spatial, 10 starts, cube, nilearn CanICA", 6),
}
if torch.cuda.is_available():
    on_gpu = ours(device="cuda")
    TASKS["temporal, ICA on " + torch.cuda.get_device_name()] = (
        HIDDEN,
        lambda X, k: on_gpu(torch.from_numpy(X).cuda(), k),
        "temporal, scikit-learn FastICA",
        None,
    )
# computed once, untimed: what the others are compared with
EXACT = {
    HIDDEN: ours(whiten_solver="gram", dtype="float64", max_iter=1),
    OUT: ours(whiten_solver="gram", dtype="float64", max_iter=1),
    SPATIAL: ours(whiten_solver="gram", dtype="float64", **CUBE),
}


def write_activations(folder: Path) -> None:
    from llmfact_nb.activations import capture
    from llmfact_nb.base.models import load_model
    from llmfact_nb.base.texts import load_texts

    model, tokenizer = load_model()
    texts = load_texts("wiki", "fit", n=24)["text"][:]
    for site in ("mlp_hidden", "mlp_out"):
        np.save(
            folder / f"{site}.npy",
            capture(model, tokenizer, texts, site, max_length=256, progress=False).values[:4096].numpy(),
        )


def load(folder: Path, data: tuple) -> np.ndarray:
    return np.load(folder / f"{data[0]}.npy", mmap_mode="r")[: data[1]].copy()


def child(name: str, folder: Path) -> None:
    """One fit in a process of its own; prints seconds, growth of peak memory and steps, and leaves maps and time
    courses in the folder."""
    warnings.simplefilter("ignore")  # whether a peer has converged is seen in its steps
    if name.startswith("growth"):
        _, T, N = name.split()
        X, k, run = (np.load(folder / "growth.npy", mmap_mode="r")[: int(T), : int(N)], 64, ours(max_iter=50))
    elif name.startswith("exact"):
        data = list(EXACT)[int(name.split()[1])]
        X, k, run = load(folder, data), data[2], EXACT[data]
    else:
        data, run, *_ = TASKS[name]
        X, k = load(folder, data), data[2]
    small = np.random.default_rng(0).laplace(size=(300, 8)) @ np.random.default_rng(1).standard_normal((8, 400))
    run(small.astype(np.float32), 4)  # what is loaded on first use
    gc.collect()
    forget_peak()
    before, result = peak_megabytes(), {}
    wall, cpu = seconds(lambda: result.update(run(X, k)))
    arrays = {key: np.asarray(result.pop(key), dtype=np.float32) for key in ("maps", "time") if key in result}
    np.savez(result_file(name, folder), **arrays)
    print("\n" + json.dumps({"seconds": wall, "cpu_seconds": cpu, "extra_mb": peak_megabytes() - before, **result}))


def measure(name: str, folder: Path) -> dict:
    found = in_own_process(__file__, "--child", name, "--data", str(folder))
    print(f"{name}: {found['seconds']:.2f} s, {found['extra_mb']:,.0f} MB", flush=True)
    return found


def result_file(name: str, folder: Path) -> Path:
    return folder / f"{re.sub(r'[^a-zA-Z0-9]+', '_', name)}.npz"


def matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    "|r| of the best one-to-one pairs of maps."
    from scipy.optimize import linear_sum_assignment

    r = np.abs(np.corrcoef(a, b)[: len(a), len(a) :])
    return r[linear_sum_assignment(-r)]


def subspace_share(folder: Path, data: tuple, time: np.ndarray, exact: np.ndarray) -> float:
    "Variance of X in the span of `time`, relative to the span of the exact time courses; float64, block by block."
    X, held = load(folder, data), [0.0, 0.0]
    bases = [np.linalg.qr(t.astype(float) - t.mean(0, dtype=float))[0] for t in (time, exact)]
    for a in range(0, X.shape[1], 4096):
        block = X[:, a : a + 4096].astype(float)
        for i, basis in enumerate(bases):
            held[i] += (np.square(basis.T @ (block - block.mean(0)))).sum()
    return held[0] / held[1]


def compare(args, folder: Path) -> tuple[list, dict]:
    names = [n for n in TASKS if not args.only or any(part in n for part in args.only)]
    found = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:  # in turns, so that a busy spell hits all of them
            found[name].append(measure(name, folder))
    for i in range(len(EXACT)):
        if not result_file(f"exact {i}", folder).exists():
            measure(f"exact {i}", folder)
    rows, results = [], {}
    for name in names:
        data, _, baseline, bar = TASKS[name]
        best = {key: statistics.median(f[key] for f in found[name]) for key in ("seconds", "cpu_seconds", "extra_mb")}
        facts, exact = (dict(best, runs=found[name]), np.load(result_file(f"exact {list(EXACT).index(data)}", folder)))
        mine, cells = np.load(result_file(name, folder)), ["", "", "", ""]
        if baseline in found:
            facts["times_faster"] = statistics.median(
                b["seconds"] / f["seconds"] for b, f in zip(found[baseline], found[name])
            )
            facts["cpu_times_faster"] = statistics.median(
                b["cpu_seconds"] / f["cpu_seconds"] for b, f in zip(found[baseline], found[name])
            )
            facts["memory_ratio"] = statistics.median(
                f["extra_mb"] / b["extra_mb"] for b, f in zip(found[baseline], found[name])
            )
            r = matched(mine["maps"], np.load(result_file(baseline, folder))["maps"])
            facts["r_median"], facts["r_p10"] = (float(np.median(r)), float(np.quantile(r, 0.1)))
            cells = [
                f"{facts['times_faster']:.1f}x",
                f"{facts['cpu_times_faster']:.1f}x",
                f"{facts['memory_ratio']:.2f}x",
                f"{facts['r_median']:.4f}, {facts['r_p10']:.3f}",
            ]
        if data == SPATIAL:
            r = matched(mine["maps"], exact["maps"])
            facts["exact_r_median"], facts["exact_r_p10"] = (float(np.median(r)), float(np.quantile(r, 0.1)))
            kept = f"maps {facts['exact_r_median']:.4f}, {facts['exact_r_p10']:.3f}"
        else:
            facts["subspace_share"] = (
                subspace_share(folder, data, mine["time"], exact["time"]) if "time" in mine else math.nan
            )
            kept = f"variance {facts['subspace_share']:.5%}" if "time" in mine else ""
        results[name] = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in facts.items()}
        rows.append(
            [
                name,
                f"{data[1]:,} x {np.load(folder / f'{data[0]}.npy', mmap_mode='r').shape[1]:,}, k {data[2]}",
                f"{best['seconds']:.2f} s",
                f"{best['extra_mb']:,.0f} MB",
                *cells,
                kept,
                f"{bar}x" if bar else "",
            ]
        )
    return rows, results


def write_growth(folder: Path, T: int, N: int) -> None:
    """A matrix on disk with the spectrum of real activations: real columns over and over, each with its own scale and
    noise."""
    X, g = np.load(folder / "mlp_hidden.npy", mmap_mode="r"), np.random.default_rng(0)
    big = np.lib.format.open_memmap(folder / "growth.npy", mode="w+", dtype=np.float32, shape=(T, N))
    for a in range(0, T, 256):
        real = X[a : a + 256]
        for b in range(0, N, X.shape[1]):
            part = real[:, : N - b]
            big[a : a + 256, b : b + X.shape[1]] = part * (
                1 + 0.3 * np.random.default_rng(b).standard_normal(part.shape[1])
            ) + 0.05 * g.standard_normal(part.shape)
    big.flush()


def growth(args, folder: Path) -> tuple[list, dict]:
    T, N = 4096, args.neurons
    write_growth(folder, T, N)
    along_N = [(2048, n) for n in (9216, 23_040, 46_080, 92_160, 184_320, N) if n <= N]
    along_T = [(t, 46_080) for t in (512, 1024, 2048, 4096)]
    found = {point: measure(f"growth {point[0]} {point[1]}", folder) for point in dict.fromkeys(along_N + along_T)}
    rows = [
        [f"{t:,}", f"{n:,}", f"{f['seconds']:.2f} s", f"{f['extra_mb']:,.0f} MB", f["report"].split(":")[0]]
        for (t, n), f in sorted(found.items())
    ]
    slope = lambda points, axis: float(
        np.polyfit([math.log(p[axis]) for p in points], [math.log(found[p]["seconds"]) for p in points], 1)[0]
    )
    slopes = {"N": slope(along_N, 1), "T": slope(along_T, 0)}
    plot_growth(found, along_N, along_T, slopes)
    return rows, {"points": [dict(T=t, N=n, **f) for (t, n), f in found.items()], "exponents": slopes}


def crossover(folder: Path) -> None:
    "Whitening by both solvers over tokens and components: where do they meet?"
    from llmfact_nb.base.whitening import CentredX, choose_solver, whiten

    X, rows, results = torch.from_numpy(np.load(folder / "mlp_hidden.npy")), [], []
    for T in (256, 512, 1024, 2048):
        for k in (32, 64, 128):
            times = {}
            for solver in ("gram", "randomized"):
                run = lambda: whiten(CentredX(X[:T]), k, solver)
                run()
                times[solver] = min(seconds(run)[0] for _ in range(3))
            auto = choose_solver(T, X.shape[1], k)[0]
            rows.append(
                [
                    f"{T:,}",
                    k,
                    f"{times['gram']:.2f} s",
                    f"{times['randomized']:.2f} s",
                    auto,
                    f"{times[auto] / min(times.values()):.2f}",
                ]
            )
            results.append(dict(T=T, k=k, auto=auto, **times))
            print(*rows[-1], flush=True)
    publish(
        "ica-crossover",
        ["tokens", "k", "gram", "randomized", "auto takes", "over the faster"],
        rows,
        f"Whitening alone, mlp_hidden, {X.shape[1]:,} neurons; the best of three.",
        {"points": results},
    )


def synthetic(T: int, N: int, k: int, device: str) -> torch.Tensor:
    "A matrix (T, N) as a large model gives it: a steep spectrum of heavy-tailed courses, with noise."
    g = torch.Generator(device).manual_seed(0)
    rank = 2 * k
    courses = (
        torch.empty(T, rank, device=device).exponential_(generator=g) * torch.arange(1, rank + 1, device=device) ** -1.0
    )
    X = torch.empty(T, N, device=device)
    for a in range(0, N, 8192):
        block = X[:, a : a + 8192]
        block.copy_(
            courses @ torch.randn(rank, block.shape[1], generator=g, device=device)
            + 0.01 * torch.randn(block.shape, generator=g, device=device)
        )
    return X


def group(T: int, N: int, k: int, device: str) -> dict:
    "One fit of a synthetic matrix; prints and returns seconds and memory."
    X = synthetic(T, N, k, device)
    wall, _ = seconds(lambda: ICA(k, max_iter=50).fit(X))
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_megabytes()
    print(f"{T:,} x {N:,}, k {k}, {name}: {wall:.2f} s, peak {peak:,.0f} MB, X itself {X.numel() * 4 / 2**20:,.0f} MB")
    return {"seconds": wall, "peak_mb": peak}


def plot_growth(found, along_N, along_T, slopes) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.8), dpi=100, sharey=True)
    for ax, points, axis, letter, name in (
        (axes[0], along_N, 1, "N", "neurons N (T = 2,048)"),
        (axes[1], along_T, 0, "T", "tokens T (N = 46,080)"),
    ):
        ax.loglog([p[axis] for p in points], [found[p]["seconds"] for p in points], "o-", color="#0072B2")
        ax.set(xlabel=name, title=f"time grows as {letter}^{slopes[letter]:.2f}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds, k = 64")
    fig.tight_layout()
    (HERE / "results").mkdir(exist_ok=True)
    fig.savefig(HERE / "results" / "ica-growth.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all fits, in turns; medians are reported")
    parser.add_argument("--only", nargs="+", help="only tasks whose name contains one of these; printed, not published")
    parser.add_argument(
        "--neurons",
        type=int,
        default=352_256,
        help="the widest matrix of the growth table; 4,096 tokens of it go to disk",
    )
    parser.add_argument(
        "--group",
        nargs=3,
        type=int,
        metavar=("T", "N", "K"),
        help="only fit one synthetic matrix of that size, on --device",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--skip",
        nargs="+",
        choices=["compare", "growth", "crossover"],
        default=[],
        help="leave these tables as they are",
    )
    parser.add_argument(
        "--data", type=Path, help="folder that keeps the activations between runs; default: a temporary one"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.data)
        raise SystemExit
    if args.group:
        group(*args.group, args.device)
        raise SystemExit
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.data or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "mlp_out.npy").exists():
            write_activations(folder)
        if "compare" not in args.skip:
            rows, results = compare(args, folder)
            head = [
                "work",
                "matrix",
                "time",
                "extra memory",
                "faster than baseline",
                "by processor time",
                "memory of baseline",
                "maps, r with baseline",
                "against exact",
                "bar",
            ]
            note = (
                "smollm2-135m, wiki texts of 256 tokens, all tokens. Each fit in a fresh process, end to end, "
                f"medians of {args.repeats} rounds; memory beside X; absolute r of matched maps (median, 10th "
                "percentile) with the baseline's of the same seed; last, the variance in the subspace found relative "
                "to the exact float64 one, or r of the maps with those after an exact float64 decomposition."
            )
            if args.only:  # a part of the table is for the eye only
                print(*(" | ".join(row) for row in [head, *rows]), sep="\n")
            else:
                publish("ica", head, rows, note, {"arguments": {**vars(args), "data": None}, "tasks": results})
        if "crossover" not in args.skip and not args.only:
            crossover(folder)
        if "growth" not in args.skip:
            rows, results = growth(args, folder)
            note = (
                f"Time grows as N^{results['exponents']['N']:.2f} and T^{results['exponents']['T']:.2f}. X on disk as "
                "float32, k = 64, 50 FastICA iterations at most; memory includes the pages of X that the system keeps."
            )
            publish("ica-growth", ["tokens", "neurons", "time", "extra memory", "whitening"], rows, note, results)
