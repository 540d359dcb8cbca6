"""Figures and tables of the paper: the numbers of the tables stand at their place, beside the published ones; a broken arm, a lacking table or hostile text spoils nothing else, and what is lacking is said."""

import io

import families
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llmfact_nb.show import paper_figures as paper
from llmfact_nb.ablation import PRESETS
from llmfact_nb.show.figures import OKABE_ITO
from llmfact_nb.paper import published
from llmfact_nb.study.whole import _Wanted, placeholder

STUDY = paper.invented_study()
HOSTILE = "$\\frac{x$ <b>|\x1b[31m\u202e\n" + 60 * "long "
SAMPLES = pd.DataFrame([
    {"arm": arm, "seed": 0, "item": item, "prompt": f"prompt {item}", "text": text, "too_long": False, "empty": False, "looping": arm == "key"}
    for arm, text in (("unmasked", "a river"), ("key", HOSTILE)) for item in range(3)
])  # fmt: skip
FIGURES = {  # name -> (function, the tables that it reads)
    "preservation": (paper.plot_preservation, ["preservation"]), "late binding": (paper.plot_late_binding, ["preservation"]), "damage": (paper.plot_damage_curves, ["damage"]), "amplification": (paper.plot_amplification, ["amplification"]),
    "networks": (paper.plot_single_networks, ["networks", "contrasts"]), "cross-task": (paper.plot_cross_task, ["cross-task"]), "lesion": (paper.plot_lesion, ["lesion", "networks"]), "factors": (paper.plot_factors, ["contrasts", "factors"]),
    "selections": (paper.plot_selections, ["union"]), "tasks": (paper.plot_masked_tasks, ["union", "random share"]), "recurrence": (paper.plot_recurrence, ["recurrence"]), "sizes": (paper.plot_network_sizes, ["sizes"]),
    "verdicts": (paper.plot_verdicts, ["verdicts"]), "generations": (paper.plot_generations, ["samples"]),
}  # fmt: skip
ONE_AXES = {"lesion", "factors", "verdicts", "generations"}


@pytest.fixture(autouse=True)
def closed():
    plt.close("all")
    yield
    plt.close("all")


def read_back(table: pd.DataFrame) -> pd.DataFrame:
    "The table as a csv file keeps it."
    return pd.read_csv(io.StringIO(table.to_csv(index=False)))


def damaged(table: pd.DataFrame) -> pd.DataFrame:
    "One row of nan and one of infinities among what is drawn; arms, texts and notes with text that would break a picture."
    table = table.copy()
    numbers = [
        c
        for c in (
            "value",
            "damage",
            "ci_low",
            "ci_high",
            "recovered",
            "recovered_low",
            "recovered_high",
            "difference",
            "r",
            "share",
            "depth",
            "here",
        )
        if c in table
    ]
    table[numbers] = table[numbers].astype(float)
    measured = table.index[table["arm"] != "unmasked"] if "arm" in table else table.index
    table.loc[measured[1], numbers], table.loc[measured[-1], numbers] = np.nan, np.inf
    for column in ("why", "claim", "note"):
        if column in table and (table[column] != "").any():
            table.loc[table[column] != "", column] = HOSTILE
    return table


@pytest.mark.parametrize("name", FIGURES)
def test_draws_where_told_in_its_own_style_with_nan_infinity_and_hostile_text(name):
    draw, reads = FIGURES[name]
    tables = [SAMPLES if t == "samples" else damaged(STUDY[t]) for t in reads]
    before = [t.copy() for t in tables]
    with plt.rc_context({"font.size": 21, "text.parse_math": True}):
        settings = dict(plt.rcParams)
        fig, axes = plt.figure(), None
        if name in ONE_AXES:
            left, axes = fig.subplots(1, 2)
            assert draw(*tables, ax=axes) is axes
            assert not left.lines and not left.texts and not left.collections
        else:
            assert draw(*tables, fig=fig) is fig
        assert plt.get_fignums() == [fig.number] and dict(plt.rcParams) == settings
    fig.draw_without_rendering()
    assert all(t.equals(b) for t, b in zip(tables, before))
    for ax in fig.axes if axes is None else [axes]:
        named = ax.get_title(loc="left") or hasattr(ax, "_colorbar") or name == "amplification"
        assert named and all(np.isfinite(ax.get_xlim())) and all(np.isfinite(ax.get_ylim()))


def numbers_drawn(ax) -> list:
    "Everything that lines and interval strokes show, in order."
    lines = [(line.get_label(), np.round(np.asarray(line.get_xydata(), float), 9).tolist()) for line in ax.lines]
    return lines + [
        np.round(s, 9).tolist() for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()
    ]


@pytest.mark.parametrize("name", ["damage", "recurrence"])
def test_csv_files_draw_what_the_study_draws(name):
    draw, reads = FIGURES[name]
    ours, theirs = (draw(*(form(STUDY[t]) for t in reads)) for form in (lambda t: t, read_back))
    for a, b in zip(ours.figure.axes, theirs.figure.axes):
        assert numbers_drawn(a) == numbers_drawn(b) and a.get_title(loc="left") == b.get_title(loc="left")


@pytest.mark.parametrize("name", FIGURES)
def test_says_which_column_or_row_is_missing(name):
    draw, reads = FIGURES[name]
    table, rest = (SAMPLES if reads[0] == "samples" else STUDY[reads[0]]), [STUDY[t] for t in reads[1:]]
    with pytest.raises(ValueError, match="no rows"):
        draw(table.iloc[:0], *rest)
    column = {
        "recurrence": "similar",
        "sizes": "share",
        "verdicts": "verdict",
        "generations": "text",
        "factors": "difference",
    }.get(name, "damage")
    with pytest.raises(ValueError, match=f"lacks the columns.*{column}"):
        draw(table.drop(columns=column), *rest)
    if "arm" in table and name not in ("factors", "generations"):
        with pytest.raises(ValueError, match="no row|no measure"):
            draw(table[table["arm"] == "unmasked"], *rest)
    if name == "damage":
        with pytest.raises(ValueError, match="no finite number in 'damage'"):
            draw(table.assign(damage=np.inf))
    assert plt.get_fignums() == []


def said(ax) -> str:
    "All text in the axes, without its line breaks."
    return " ".join(" ".join(t.get_text() for t in ax.texts).split())


def line(ax, label: str):
    return next(of for of in ax.lines if str(of.get_label()).startswith(label))


def test_figure_3_shows_the_study_beside_the_paper():
    table = STUDY["preservation"]
    fig = paper.plot_preservation(table)
    here, paper_panel = fig.axes[1], fig.axes[0]
    for label, arm, late in (
        ("networks, right", "keep key", False),
        ("networks, late", "keep key", True),
        ("random, right", "keep random", False),
    ):
        rows = table[
            (table.arm == arm)
            & table.fraction.isna()
            & (table.measure == "nats")
            & (table.late_binding == late)
            & (table.note == "")
        ]
        assert np.allclose(line(here, label).get_xydata(), rows[["k", "recovered"]].to_numpy(float))
    assert [t.get_text().split("\n")[1:] for t in here.get_xticklabels()][-1] == [
        "22 %",
        "100 %",
    ] and "not measured: k 512" in said(here)
    runs = published("preservation").query("model == 'GPT-2'").pivot(index="k", columns="task", values="score")
    normal = published("ablation").query("model == 'GPT-2' and arm == 'unmasked'").set_index("task")["score"]
    assert np.allclose(line(paper_panel, "GPT-2").get_ydata(), (runs / normal).median(axis=1).astype(float))
    assert {
        round(float(of.get_ydata()[0]), 2)
        for of in fig.axes[2].lines
        if of.get_xdata()[0] == 0 and len(of.get_xdata()) == 2
    } == {0.81, 0.55, 0.5}
    deep = table.assign(recovered=table.recovered.where(table.fraction.notna() | (table.k != 64), -7.0))
    shown = line(paper.plot_preservation(deep, floor=-0.4).axes[1], "networks, right").get_ydata()
    assert shown[1] == -0.4 and shown[0] > 0


def test_over_draws_the_mean_and_the_widest_interval():
    table = STUDY["damage"]
    fig = paper.plot_damage_curves(table)
    ax, rows = fig.axes[0], table[(table.arm == "random") & (table.fraction == 0.01)]
    assert len(rows) == 3 and line(ax, "random, 3 draws")
    at = dict(line(ax, "random, 3 draws").get_xydata())
    assert at[0.01] == pytest.approx(rows.damage.mean())
    strokes = {
        tuple(np.round(s[:, 1], 9)) for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()
    }
    assert (round(rows.ci_low.min(), 9), round(rows.ci_high.max(), 9)) in strokes
    norm = dict(line(fig.axes[1], "key").get_xydata())
    assert norm == pytest.approx(dict(table[table.arm == "key"][["injected", "damage"]].to_numpy(float)))
    gone = table.assign(damage=table.damage.where(table.arm != "PCA"), injected=np.nan)
    left = paper.plot_damage_curves(gone).axes[1]
    assert "PCA (5 times)" in said(left) and "no norm" in said(left)


def test_gain_one_and_nothing_added_change_nothing():
    fig = paper.plot_amplification(STUDY["amplification"])
    for ax, x in zip(fig.axes, (1.0, 1.0, 0.0)):
        assert dict(line(ax, "key").get_xydata())[x] == 0.0
    assert dict(line(fig.axes[3], "key").get_xydata())[1.0] == pytest.approx(0.81)
    rows = STUDY["amplification"].query("arm == 'key' and measure == 'nats' and about == 'mean' and add_sd == 0")
    assert dict(line(fig.axes[1], "key").get_xydata()) == pytest.approx(
        dict(rows[["gain", "damage"]].to_numpy(float)) | {1.0: 0.0}
    )


def test_each_network_beside_its_own_draws():
    table = STUDY["networks"]
    ax = paper.plot_single_networks(table, STUDY["contrasts"]).axes[1]
    draws = table[(table.arm == "random") & (table.network == 4)].damage.tolist()
    assert any(
        len(of.get_xdata()) == 19 and set(of.get_ydata()) == {4} and np.allclose(of.get_xdata(), draws)
        for of in ax.lines
    )
    assert ax.get_yticklabels()[4].get_text() == "4: 61 units, p 0.05" and "19 random draws of each" in said(ax)


def test_cross_task_cells_stand_where_they_were_found_and_measured():
    table = STUDY["cross-task"]
    ax = paper.plot_cross_task(table.sample(frac=1, random_state=0)).axes[0]
    rows, columns = ([t.get_text() for t in of] for of in (ax.get_yticklabels(), ax.get_xticklabels()))
    key = (
        table[table.arm == "key"]
        .assign(data=lambda t: t.data.str.removesuffix(", short"))
        .set_index(["found_on", "data"])
        .damage
    )
    shown = ax.images[0].get_array()
    assert len(rows) == len(columns) == 4 and all(
        shown[i, j] == pytest.approx(key[r, c]) for i, r in enumerate(rows) for j, c in enumerate(columns)
    )


def test_an_arm_has_a_look_of_its_own():
    looks = [
        paper.ARM_LOOKS[a]
        for a in (
            "key",
            "PCA",
            "rotation",
            "gradient x activation",
            "Wanda score",
            "top variance",
            "matched shuffle",
            "matched random",
            "random",
            "least active",
        )
    ]
    assert len({colour for colour, _, _ in looks}) == len({(marker, style) for _, marker, style in looks}) == len(looks)
    assert paper._looks("keep PCA") == paper._looks("PCA") and paper._looks("keep key")[0] == OKABE_ITO["bluish green"]


def test_paper_tables_hold_published_numbers_and_the_studys():
    one, four, six, ten = (paper.paper_table(n, STUDY) for n in (1, 4, 6, 10))
    assert one.iloc[-2]["published: all"] == 2716 and one.iloc[-1]["published: code"] == pytest.approx(10.21)
    counts = STUDY["recurrence"].query("method == 'ICA' and template == 3")
    row = one.set_index("template").loc["3"]
    assert (
        row["here: code"] == counts.query("texts == 'code'").similar.sum() and row["here: all"] == counts.similar.sum()
    )
    assert one.iloc[-1]["here: all"] == pytest.approx(STUDY["recurrence"].query("method == 'ICA'").similar.sum() / 32)
    assert four["published: units"].sum() == 366 and four["published: accuracy lost"].max() == pytest.approx(
        0.8614 - 0.5749
    )
    draws = STUDY["networks"].query("arm == 'random' and network == 7").damage
    assert four.loc[7, ["here: draws", "here: random, highest", "here: units"]].tolist() == [19, draws.max(), 16]
    assert six.set_index("task").loc["SST-2", ["published: unmasked", "published: 10 networks"]].tolist() == [
        0.844,
        0.0,
    ]
    key = STUDY["union"].query("arm == 'key' and measure == 'accuracy'").iloc[0]
    ours = six.set_index(["task", "measure"]).loc[("sentences", "accuracy")]
    assert (
        ours["here: key neurons"] == key.value
        and ours["here: key, low"] == pytest.approx(key.unmasked - key.ci_high)
        and ours["here: majority"] == 0.55
    )
    ten = ten.set_index("k")
    assert (
        ten.loc["512", "published: MRPC"] == 0.8162
        and ten.loc["unmasked", "published: MRPC"] == 0.8161
        and ten.loc["10", "published: most kept"] == pytest.approx(3399 / 114_688)
    )
    late = STUDY["preservation"].query("arm == 'keep key' and k == 128 and late_binding and measure == 'nats'").iloc[0]
    assert ten.loc["128", "here: loss recovered, networks, late-bound"] == late.recovered and ten.loc[
        "128", "here: kept, late-bound"
    ] == pytest.approx(1 - late.share)
    assert "Not measured: k 512" in paper.paper_table(8, STUDY).attrs["caption"]
    read = {name: read_back(STUDY[name]) for name in ("preservation", "networks", "contrasts")}
    for n, ours in ((4, four), (10, ten.reset_index())):
        pd.testing.assert_frame_equal(paper.paper_table(n, read), ours, check_dtype=False)
    for n in range(1, 11):
        bare = paper.paper_table(n)
        assert (
            "no counterpart" in bare.attrs["caption"]
            and not any(c.startswith("here") for c in bare)
            and "arXiv" in bare.attrs["source"]
        )
        assert f"Table {n}:" in bare.attrs["title"]
    broken = paper.paper_table(5, {"union": STUDY["union"].drop(columns="value")})
    assert "lacks the columns ['value']" in broken.attrs["caption"] and len(broken) == 8
    for wrong in (0, 11, True, "4"):
        with pytest.raises(ValueError, match="Tables 1 to 10"):
            paper.paper_table(wrong)


def row(arm: str, value: float, data: str, measure: str = "accuracy", **of) -> dict:
    "A measured row; each set of sentences has an unmasked model and a majority of its own."
    unmasked, majority, items = {"sentences": (0.81, 0.6, 500), "sentences, short": (0.8, 0.7, 60)}.get(
        data, (3.0, np.nan, 20_000 if data == "wiki" else 1_000)
    )
    damage = unmasked - value if measure == "accuracy" else value - unmasked
    of = {
        "study": "union",
        "setting": "baseline",
        "seed": np.nan,
        "units": 461,
        "broken": False,
        "documents": items,
        "items": items,
        "about": "mean",
        "positions": "after-first",
        "majority": majority,
        "chance": 0.5,
    } | of
    return {
        "arm": arm,
        "data": data,
        "measure": measure,
        "value": value,
        "unmasked": unmasked,
        "damage": damage,
        "ci_low": damage - 0.05,
        "ci_high": damage + 0.05,
    } | of


def two_sets() -> tuple[pd.DataFrame, list[dict], list[dict]]:
    "A union on all sentences, and 15 % at random on 60 of them and on all."
    union = pd.DataFrame(
        [
            row(arm, value, "sentences", measure, seed=seed)
            for measure in ("accuracy", "label nats")
            for arm, value, seed in (
                ("unmasked", 0.81, np.nan),
                ("key", 0.71, np.nan),
                ("random", 0.79, 0),
                ("random", 0.77, 1),
            )
        ]
    )
    draws = lambda data, values: [
        row("random 15 %", v, data, m, seed=s, about=about, units=6_912)
        for m in ("accuracy", "label nats")
        for s, v in enumerate(values)
        for about in ("zero", "mean")
    ]
    return union, draws("sentences, short", (0.7, 0.7)), draws("sentences", (0.55, 0.65))


def test_random_15_percent_stands_only_beside_rows_on_the_same_sentences():
    union, short, long = two_sets()
    for share, drawn, values in ((short, False, None), (short + long, True, [0.55, 0.65]), (long, True, [0.55, 0.65])):
        here = paper.plot_masked_tasks(union, pd.DataFrame(share)).axes[3]
        rows = [t.get_text().split("\n")[0] for t in here.get_yticklabels()]
        assert rows == ["key", "random", *["random 15 %"] * drawn]
        assert ("random 15 %: not measured on these texts" in said(here)) != drawn
        points = sorted(x for of in here.lines if of.get_linestyle() == "None" for x in of.get_xdata())
        assert points == pytest.approx(sorted([0.71, 0.77, 0.79, *(values or [])]))
        table = paper.paper_table(5, {"union": union, "random share": pd.DataFrame(share)})
        for measure in ("accuracy", "label nats"):
            ours = table.set_index(["task", "measure"]).loc[("sentences", measure)]
            assert ours["here: random 15 %"] == pytest.approx(0.6) if drawn else "here: random 15 %" not in table
            assert ours["here: random"] == pytest.approx(0.78)


def test_levels_of_guessing_belong_to_accuracy_alone():
    table = paper.paper_table(5, {"union": two_sets()[0]}).set_index(["task", "measure"])[
        ["here: chance", "here: majority"]
    ]
    assert (
        table.loc[("sentences", "accuracy")].tolist() == [0.5, 0.6]
        and table.loc[("sentences", "label nats")].isna().all()
    )


def difference(study: str, setting: str, data: str, value: float, **of) -> dict:
    return {
        "study": study,
        "setting": setting,
        "arm": "key",
        "against": "random",
        "seeds": 3,
        "units": 461,
        "data": data,
        "measure": "nats",
        "difference": value,
        "ci_low": value - 0.1,
        "ci_high": value + 0.1,
        "network": np.nan,
        "p": np.nan,
    } | of


def test_factors_measured_on_other_texts_are_left_out_and_counted():
    grid = [difference("union", "baseline", "wiki", 1.0), difference("union", "baseline", "wiki, short", 5.0)]
    grid += [difference("factors", s, "wiki, short", 6.0) for s in ("zero, all", "alpha 3.6")] + [
        difference("factors", s, "wiki", v) for s, v in (("k 10", 1.1), ("k 64", 1.2), ("ICA seed 1", 1.3))
    ]
    ax = paper.plot_factors(pd.DataFrame(grid))
    assert [t.get_text().split(":")[0] for t in ax.get_yticklabels()] == ["baseline", "k 10", "k 64", "ICA seed 1"]
    assert line(ax, "minus random").get_xdata().tolist() == [1.0, 1.1, 1.2, 1.3]
    assert "measured on wiki;" in said(ax) and "left out: 2 settings measured on other texts" in said(ax)
    bare = paper.plot_factors(pd.DataFrame(grid[2:]))
    assert "baseline: not measured on these texts" in said(bare) and "left out" not in said(
        paper.plot_factors(pd.DataFrame([grid[0], *grid[4:]]))
    )
    answers = paper.plot_factors(pd.DataFrame(grid).assign(measure="accuracy"), measure="accuracy")
    assert answers.get_xlabel().endswith(", accuracy")


def test_a_row_of_selections_counts_the_draws_that_it_shows():
    union = [row("key", 4.0, data, "nats") for data in ("wiki", "wiki, short")]
    union += [
        row("matched shuffle", 4.1, "wiki", "nats", seed=0, variance_ratio=0.9),
        *(row("matched shuffle", 4.1, "wiki, short", "nats", seed=s, variance_ratio=0.5) for s in range(19)),
    ]
    union += [row("random", 3.1, "wiki, short", "nats", seed=0)]
    ax = paper.plot_selections(pd.DataFrame(union)).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "key\n461 units",
        "matched shuffle\n461 units, 1 draw, variance × 0.90",
    ] and "wiki: 20,000 tokens" in said(ax)


TEXTS = {"wiki": 4.0, "wiki, short": 7.0}


def alone_on_two_texts() -> pd.DataFrame:
    rows = [
        [
            row("network", value, data, "nats", network=0),
            *(row("random", value - 0.5, data, "nats", network=0, seed=s) for s in range(3)),
        ]
        for data, value in TEXTS.items()
    ]
    return pd.DataFrame(sum(rows, [])).assign(note="", share=0.01)


def test_p_values_are_of_the_texts_that_are_shown():
    networks = alone_on_two_texts()
    contrasts = pd.DataFrame(
        [
            difference("networks", "baseline", data, 0.1, arm="network", network=0, p=p)
            for data, p in (("wiki", 0.05), ("wiki, short", 0.9))
        ]
    )
    assert paper.plot_single_networks(networks, contrasts).axes[1].get_yticklabels()[0].get_text().endswith("p 0.05")
    assert paper.paper_table(4, {"networks": networks, "contrasts": contrasts}).loc[0, "here: p"] == 0.05


def test_draws_stand_beside_a_lesion_on_the_same_texts():
    networks = alone_on_two_texts()
    lesion = pd.DataFrame(
        [row("lesion", 4.2, "wiki", "nats", network=0), row("network", 4.0, "wiki", "nats", network=0)]
    )
    strokes = lambda ax: [x for of in ax.lines if of.get_marker() == "|" for x in of.get_xdata()]
    assert strokes(paper.plot_lesion(lesion, networks)) == pytest.approx([0.5] * 3)
    apart = paper.plot_lesion(lesion, networks[networks["data"] != "wiki"])
    assert strokes(apart) == [] and "random neurons: not measured on these texts" in said(apart)


def test_all_texts_and_their_beginnings_do_not_share_a_cell():
    cross = pd.DataFrame([row("key", value, data, "nats", found_on="wiki", note="") for data, value in TEXTS.items()])
    cells = paper.plot_cross_task(cross).axes[0]
    assert [t.get_text() for t in cells.get_xticklabels()] == list(TEXTS) and cells.images[0].get_array().tolist() == [
        [1.0, 4.0]
    ]


def test_rendered_tables_are_harmless():
    frame = paper.generation_table(SAMPLES)
    assert list(frame.columns) == ["arm", "1: prompt 0", "2: prompt 1", "3: prompt 2"] and frame.iloc[1, 1] == HOSTILE
    for form in ("markdown", "html"):
        text = paper.render_table(frame, form)
        assert "<b>" not in text and "\x1b" not in text and "\u202e" not in text and "&lt;b&gt;" in text
    lines = paper.render_table(frame).split("\n")
    assert all(of.replace("\\|", "").count("|") == 5 for of in lines[:4]) and "\\$\\\\frac" in lines[3]
    numbers = pd.DataFrame(
        {
            "n": [1234, 0],
            "x": [0.12345678, -np.inf],
            "y": [np.nan, 1e-5],
            "z": pd.array([None, 7], dtype="Int64"),
            "b": [True, False],
        }
    )
    assert paper.render_table(numbers).split("\n")[2:4] == [
        "| 1,234 | 0.1235 | – | – | yes |",
        "| 0 | −∞ | 1e−05 | 7 | no |",
    ]
    with pytest.raises(ValueError, match="'markdown', 'html'"):
        paper.render_table(frame, "latex")


def test_everything_at_once_says_what_is_missing_and_leaves_nothing_old(tmp_path):
    tables = {name: damaged(STUDY[name]) for name in ("verdicts", "lesion")} | {
        "union": STUDY["union"].drop(columns="damage"),
        "damage": STUDY["damage"].iloc[:0],
    }
    (tmp_path / "selections.png").write_bytes(b"old")
    (tmp_path / "mine.png").write_bytes(b"mine")
    drawn = paper.draw_paper(tables, tmp_path, samples=SAMPLES, title="of <model>", dpi=40)
    assert set(drawn) == {p.name for p in tmp_path.iterdir()} - {"mine.png"} and all(
        drawn[name] == tmp_path / name for name in drawn
    )
    assert {
        "fig-1-scheme.png",
        "late-binding.png",
        "lesion.png",
        "verdicts.png",
        "fig-4-5-generations.png",
        "table-01.csv",
        "table-10.md",
        "generations.md",
        "verdicts.csv",
        "index.md",
    } <= set(drawn)
    assert (
        "lacks the columns ['damage']" in drawn.missing["selections.png"]
        and "no rows" in drawn.missing["damage.png"]
        and "no table 'recurrence'" in drawn.missing["recurrence.png"]
    )
    assert "no set of networks 'baseline'" in drawn.missing["fig-2-maps.png"] and not set(drawn) & set(drawn.missing)
    index = (tmp_path / "index.md").read_text()
    assert "of &lt;model&gt;" in index and all(name in index for name in [*drawn, *drawn.missing] if name != "index.md")
    assert plt.get_fignums() == [] and (tmp_path / "lesion.png").read_bytes()[:4] == b"\x89PNG"


def test_generation_arms_touch_the_units_they_name_and_networks_are_drawn():
    model = families.build("llama")
    found = placeholder(
        model, _Wanted(PRESETS["recommended"].__class__(n_components=4, fit_tokens=100, fraction=0.1), "wiki")
    )
    arms = paper.generation_arms(model, found, networks=(1, 3))
    masks, total = found.network_masks(), found.key.n_neurons
    assert next(iter(arms)) == "unmasked" and arms["unmasked"] is None
    for name, opened in list(arms.items())[1:]:
        units = int(name.split(", ")[1].split()[0].replace(",", ""))
        with opened() as counts:
            assert sum(counts) == (total - units if name.startswith("keep") else units)
    assert f"network 3, {masks[3].n} units" in arms and f"keep key, {found.key.n} units" in arms
    union = STUDY["union"].assign(counts=" ".join(map(str, found.key.counts)))
    assert "network 0" in paper._draw_maps(found).axes[0].get_title(loc="left")
    ax = paper._draw_layers(union[union.arm.isin(("key", "PCA"))], found)
    assert [of.get_color() for of in ax.lines[:2]] == [paper.ARM_LOOKS[a][0] for a in ("key", "PCA")] and list(
        ax.lines[0].get_ydata()
    ) == pytest.approx([100 * c / w for c, w in zip(found.key.counts, found.networks.widths)])
    with pytest.raises(ValueError, match="stability is nan"):
        paper._draw_stability(found)
