"""Figures: they draw what they were given, the same for tensors, arrays and frames; they leave data, settings and
other figures alone; text from data cannot break them."""

import io
import subprocess
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from llmfact_nb.show import figures
from llmfact_nb.base.files import write_text

WIDTHS = [40, 40, 24]
N = sum(WIDTHS)


class Mask:
    "What a figure may expect of a NeuronMask."

    def __init__(self, flat):
        self.flat = torch.as_tensor(flat)
        self.counts = [int(part.sum()) for part in self.flat.split(WIDTHS)]


SEEN = {  # linear RGB as people see it who lack one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1)
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(colours, seen) -> np.ndarray:
    "CIE L*a*b*, (n, 3), in which equal distances look about equal; 2 is just visible."
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.transpose(seen)
    xyz = (
        linear.clip(0, 1)
        @ np.transpose([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        / [0.95047, 1, 1.08883]
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_every_arm_has_a_colour_that_all_can_tell_apart(seen):
    from llmfact_nb.masks import CONTROLS

    assert {"key", "PCA", "rotation", "gradient x activation", "Wanda score", *CONTROLS} <= figures.ARM_COLOURS.keys()
    places = lab(figures.ARM_COLOURS.values(), seen)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 100 * np.eye(len(places))
    assert apart.min() > 10, [list(figures.ARM_COLOURS)[i] for i in np.unravel_index(apart.argmin(), apart.shape)]


def results(**changes):
    rows = []
    for condition in ("mean, after the first token", "zero, everywhere"):
        for arm, seeds, damage in (("unmasked", 1, 0.0), ("key", 2, 1.1), ("random", 3, 0.02), ("all off", 1, 11.0)):
            for seed in range(seeds):
                d = damage * (1 + 0.1 * seed)
                rows.append(
                    {
                        "condition": condition,
                        "arm": arm,
                        "seed": seed if seeds > 1 else None,
                        "units": 7,
                        "damage": d,
                        "ci_low": 0.9 * d,
                        "ci_high": 1.2 * d,
                        "above_vocabulary": d > 10,
                        **changes,
                    }
                )
    return pd.DataFrame(rows)


def maps(k=3):
    return np.random.default_rng(0).standard_normal((k, N)).astype("float32") * 3


FIGURES = {
    "scheme": lambda **where: figures.plot_scheme(**where),
    "maps": lambda **where: figures.plot_maps(maps(), WIDTHS, threshold=3.0, **where),
    "units": lambda **where: figures.plot_units_per_layer({"key": [3, 0, 5], "random": "1 2 5"}, WIDTHS, **where),
    "equal widths": lambda **where: figures.plot_units_per_layer({"key": [3, 0, 5]}, [40] * 3, **where),
    "damage": lambda **where: figures.plot_damage(results(), **where),
    "time courses": lambda **where: figures.plot_time_courses(maps().T, text_ids=np.arange(N) // 30, **where),
    "tokens": lambda **where: figures.plot_time_courses(maps().T, tokens=["a"] * N, **where),
    "connectivity": lambda **where: figures.plot_connectivity(np.corrcoef(maps()), **where),
    "stability": lambda **where: figures.plot_stability([0.9, 0.4, -0.1], n_init=10, **where),
    "variance": lambda **where: figures.plot_variance_share(
        {"mlp_out": [0.5, 0.9, 1.0], "mlp_hidden": [0.3, 0.6, 1.0]}, **where
    ),
}
MANY_PANELS = {"maps", "damage"}


@pytest.fixture(autouse=True)
def closed():
    plt.close("all")
    yield
    plt.close("all")


def png(drawn) -> bytes:
    "The picture as the user would save it, outside the package's style."
    out = io.BytesIO()
    drawn.figure.savefig(out, format="png", dpi=60, facecolor="white", metadata={"Software": None})
    plt.close(drawn.figure)
    return out.getvalue()


@pytest.mark.parametrize("name", FIGURES)
def test_the_users_settings_neither_change_nor_matter(name):
    plain = png(FIGURES[name]())
    with (
        plt.style.context("dark_background"),
        plt.rc_context({"font.size": 21, "xtick.labelsize": 21, "lines.linewidth": 9, "figure.autolayout": True}),
    ):
        before = dict(plt.rcParams)
        drawn = FIGURES[name]()
        assert dict(plt.rcParams) == before
        assert png(drawn) == plain


@pytest.mark.parametrize("name", FIGURES)
def test_draws_where_it_is_told_and_opens_nothing_else(name):
    if name in MANY_PANELS:
        fig = plt.figure()
        assert FIGURES[name](fig=fig) is fig
    else:
        fig, (left, right) = plt.subplots(1, 2)
        assert FIGURES[name](ax=right) is right
        assert not left.lines and not left.collections and not left.images
    assert plt.get_fignums() == [fig.number]
    fig.draw_without_rendering()


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"scheme"}))
def test_axes_have_names(name):
    drawn = FIGURES[name]()
    fig = drawn.figure
    assert fig.get_supxlabel() or drawn.get_xlabel()
    assert (
        name == "damage" or fig.get_supylabel() or drawn.get_ylabel() or "time" in name or name == "tokens"
    )  # there the rows carry names
    assert all(ax.get_title(loc="left") for ax in fig.axes if not hasattr(ax, "_colorbar"))


def test_settings_come_back_after_an_error():
    before = dict(plt.rcParams)
    with pytest.raises(ValueError):
        figures.plot_maps(maps(), [1, 2, 3])
    with pytest.raises(KeyError), figures.style():
        raise KeyError
    assert dict(plt.rcParams) == before


def test_tensors_arrays_frames_and_lists_give_one_picture_and_stay_untouched():
    z = maps().round(1)
    forms = [z, z.astype("float64"), torch.tensor(z), torch.tensor(z, requires_grad=True), pd.DataFrame(z), z.tolist()]
    assert len({png(figures.plot_maps(f, WIDTHS)) for f in forms}) == 1
    assert len({png(figures.plot_time_courses(f)) for f in forms}) == 1
    whole = torch.tensor(z).round()
    assert png(figures.plot_maps(whole.bfloat16(), WIDTHS)) == png(figures.plot_maps(whole, WIDTHS))
    assert np.array_equal(z, maps().round(1))
    table = results()
    figures.plot_damage(table)
    assert table.equals(results())


def test_maps_show_every_selected_unit_at_its_layer_and_place():
    z = maps()
    chosen = z > 4
    fig = figures.plot_maps(z, WIDTHS, masks=[Mask(c) for c in chosen], networks=[2, 0], depths=[5, 7, 9])
    for row, j in enumerate([2, 0]):
        ax = fig.axes[2 * row + 1]
        dots = ax.collections[-1].get_offsets()
        expected = [
            (unit, layer)
            for layer, part in enumerate(np.split(chosen[j], np.cumsum(WIDTHS)[:-1]))
            for unit in np.flatnonzero(part)
        ]
        assert sorted(map(tuple, np.asarray(dots).astype(int))) == sorted(expected)
        assert f"network {j}: {chosen[j].sum()} units" in ax.get_title(loc="left")
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["5", "7", "9"]
    same = figures.plot_maps(z, WIDTHS, masks=chosen, networks=[2, 0], depths=[5, 7, 9])  # plain booleans will do
    assert png(same) == png(fig)


def test_wide_layers_keep_their_extremes():
    z = np.zeros((1, 3 * 5000))
    z[0, [123, 7000, 14999]] = [9, -8, 5]
    picture = figures.plot_maps(z, [5000] * 3).axes[0].images[0].get_array()
    assert picture.shape[1] <= 256
    assert [picture[layer].compressed().tolist() for layer in range(3)] == [[9], [-8], [5]]


def test_an_empty_mask_is_an_empty_panel():
    fig = figures.plot_maps(maps(), WIDTHS, masks=np.zeros((3, N), bool), networks=[0])
    assert fig.axes[1].get_title(loc="left") == "network 0: 0 units selected (0.00%)"
    figures.plot_units_per_layer({"none": [0, 0, 0]}, WIDTHS)


def marks(ax, crosses: bool) -> list[float]:
    "Where the marks stand that are large crosses, or that are not."
    chosen = [of for of in ax.lines if of.get_linestyle() == "None"]
    cross = lambda of: of.get_marker() == "x" and of.get_markersize() > 5
    return sorted(x for of in chosen if cross(of) == crosses for x in of.get_xdata())


def test_damage_draws_every_draw_its_interval_and_crosses_out_what_is_above_the_vocabulary():
    table = results()
    fig = figures.plot_damage(table)
    for ax, condition in zip(fig.axes, ("mean, after the first token", "zero, everywhere")):
        here = table[(table.condition == condition) & (table.arm != "unmasked")]
        assert np.allclose(marks(ax, False), sorted(here.damage))
        assert np.allclose(marks(ax, True), here.damage[here.above_vocabulary])
        ends = {
            tuple(np.round(s[:, 0], 6)) for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()
        }
        assert {tuple(np.round(r, 6)) for r in here[["ci_low", "ci_high"]].to_numpy()} <= ends
        assert ax.get_xscale() == "symlog"  # 0.02 to 11
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [
        "key\n7 units, 2 draws",
        "random\n7 units, 3 draws",
        "all off\n7 units",
    ]


def test_damage_reads_a_table_back_from_csv(tmp_path):
    table = results()
    table.to_csv(tmp_path / "results.csv", index=False)
    assert png(figures.plot_damage(pd.read_csv(tmp_path / "results.csv"))) == png(figures.plot_damage(table))


def test_damage_without_intervals_and_with_one_condition_per_row():
    figures.plot_damage(results(ci_low=None, ci_high=None)).draw_without_rendering()
    words = results().drop(columns="condition").assign(replace="mean", positions="after-first")
    assert figures.plot_damage(words).axes[0].get_title(loc="left") == "mean, after the first token"
    figures.plot_damage(results().astype({"seed": "Int64"})).draw_without_rendering()
    many = pd.concat([results(condition=f"condition {i}") for i in range(4)])
    fig = figures.plot_damage(many)
    assert sum(ax.axison for ax in fig.axes) == 4
    fig.draw_without_rendering()


def test_a_connectivity_matrix_in_the_callers_order():
    C = np.corrcoef(maps(5))
    C[1, 2] = C[2, 1] = np.nan
    ax = figures.plot_connectivity(C, order=[4, 2, 0, 1, 3])
    assert np.allclose(
        np.ma.filled(ax.images[0].get_array(), np.nan), C[np.ix_([4, 2, 0, 1, 3], [4, 2, 0, 1, 3])], equal_nan=True
    )
    assert ax.images[0].get_clim() == (-1, 1)
    assert len(ax.texts) == 25 - 2  # numbers in the cells, none where there is no correlation


@pytest.mark.parametrize("text", ["$x_{", "\\frac{", "漢字", "\x00\x1b[31m", "a\nb", "🙂", "%", "", " "])
def test_text_from_data_cannot_break_a_figure(text, recwarn):
    with plt.rc_context({"text.parse_math": True}):
        fig, ax = plt.subplots()
        figures.plot_time_courses(np.eye(4), tokens=[text] * 4, ax=ax)
        drawn = [
            ax,
            figures.plot_connectivity(np.eye(2), labels=[text, "b"]),
            figures.plot_units_per_layer({text: [1, 1, 1]}, WIDTHS),
            figures.plot_damage(results(condition=text).replace("key", text)),
        ]
        for d in drawn:
            d.figure.draw_without_rendering()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_a_token_cut_through_a_character_is_drawn():
    figures.plot_time_courses(np.eye(2), tokens=["\udc80", "\ufffd"]).figure.draw_without_rendering()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: figures.plot_maps(maps(), [40, 40]), ("widths", "80", "104")),
        (lambda: figures.plot_maps(maps()[0], WIDTHS), ("maps", "(104,)")),
        (lambda: figures.plot_maps(maps() * np.nan, WIDTHS), ("maps", "nan")),
        (lambda: figures.plot_maps(maps(), WIDTHS, networks=[7]), ("networks", "0 to 2")),
        (lambda: figures.plot_maps(maps(), WIDTHS, masks=np.ones((2, N))), ("masks", "2", "3")),
        (lambda: figures.plot_maps(maps(), WIDTHS, masks=np.ones((3, 9))), ("masks", "9", "104")),
        (lambda: figures.plot_maps(maps(), WIDTHS, depths=[0, 1]), ("depths", "2", "3")),
        (
            lambda: figures.plot_damage(results().drop(columns=["ci_low", "above_vocabulary"])),
            ("ci_low", "above_vocabulary"),
        ),
        (lambda: figures.plot_damage(results(arm="unmasked")), ("unmasked",)),
        (lambda: figures.plot_time_courses(maps().T, tokens=["a"]), ("tokens", "1", "104")),
        (lambda: figures.plot_time_courses(maps().T, text_ids=[1, 2]), ("text_ids", "2", "104")),
        (lambda: figures.plot_time_courses(np.empty((0, 3))), ("time_courses", "(0, 3)")),
        (lambda: figures.plot_connectivity(maps()), ("C", "(3, 104)")),
        (lambda: figures.plot_connectivity(np.eye(3), order=[0, 0, 1]), ("order",)),
        (lambda: figures.plot_connectivity(np.eye(3), labels=["a"]), ("labels", "1", "3")),
        (lambda: figures.plot_stability(np.full(3, np.nan)), ("stability", "n_init")),
        (lambda: figures.plot_stability(np.ones((2, 2))), ("stability", "(2, 2)")),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_no_figure(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert all(w in str(e.value) for w in words), str(e.value)
    assert not plt.get_fignums()


def test_saving_is_whole_or_nothing_and_closes_the_figure(tmp_path):
    path = figures.save_figure(figures.plot_stability([1.0]), tmp_path / "new" / "stability.png")
    assert plt.imread(path).shape[:2] == (264, 792) and not plt.get_fignums()
    write_text(path, "the old picture")
    ax = figures.plot_stability([1.0])
    ax.figure.savefig = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        figures.save_figure(ax, path)
    assert path.read_text() == "the old picture" and [p.name for p in path.parent.iterdir()] == ["stability.png"]


def test_a_mark_stands_in_the_picture(tmp_path):
    plain, marked = (
        figures.save_figure(figures.plot_stability([1.0]), tmp_path / f"{mark}.png", mark=mark)
        for mark in ("", "quick: for trying out")
    )
    ink = lambda path: (plt.imread(path)[..., :3].min(-1) < 0.9)[:30, 400:].sum()
    assert ink(plain) == 0 and ink(marked) > 50


def test_importing_the_module_loads_neither_torch_nor_matplotlib():
    code = "import sys, llmfact_nb.show.figures, llmfact_nb.show.report; "
    code += "sys.exit(bool({'torch', 'matplotlib', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
