"""Figures and tables of the paper, drawn from the study beside the tutorial: its numbers stand at their place beside
the published ones; spoilt rows, a lacking table or hostile text spoil nothing else, and what is lacking is said."""

import io
import re

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llmfact_nb.paper import published_frames
from llmfact_nb.show import paper_curves as curves
from llmfact_nb.show import paper_tables as paper
from llmfact_nb.show.pages import render_table
from llmfact_nb.show.paper_index import draw_paper, paper_figure

HOSTILE = "$\\frac{x$ <b>|\x1b[31m\u202e\n" + 60 * "long "
WRITTEN = {"seed": 0, "too_long": False, "empty": False, "looping": False}
SAMPLES = pd.DataFrame(
    [
        WRITTEN | {"arm": arm, "item": item, "prompt": f"prompt {item}", "text": text}
        for arm, text in (("unmasked", "a river"), ("key", HOSTILE))
        for item in range(3)
    ]
)
PUBLISHED = published_frames()
READS = {  # figure -> the tables that it reads, the necessary one first
    "fig-3-preservation": ["preservation"],
    "late-binding": ["preservation"],
    "damage": ["damage"],
    "amplification": ["amplification"],
    "networks": ["networks", "contrasts"],
    "cross-task": ["cross-task"],
    "subtraction": ["subtraction", "networks"],
    "factors": ["contrasts", "factors"],
    "selections": ["union"],
    "masked-tasks": ["union", "random share"],
    "recurrence": ["recurrence"],
    "sizes": ["sizes"],
}


def draw(name: str, *tables: pd.DataFrame):
    "The figure from these tables, the first ones that it reads."
    return paper_figure(name, dict(zip(READS[name], tables)), PUBLISHED)


@pytest.fixture(autouse=True)
def closed():
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def study(paper_study):
    return paper_study


def read_back(table: pd.DataFrame) -> pd.DataFrame:
    "The table as a csv file keeps it."
    return pd.read_csv(io.StringIO(table.to_csv(index=False)))


SPOILT = "value damage ci_low ci_high recovered recovered_low recovered_high difference r share depth here".split()


def spoilt(table: pd.DataFrame) -> pd.DataFrame:
    "One row of nan and one of infinities among what is drawn; notes and claims with text that would break a picture."
    table = table.copy()
    numbers = [c for c in SPOILT if c in table]
    table[numbers] = table[numbers].astype(float)
    measured = table.index[table["arm"] != "unmasked"] if "arm" in table else table.index
    table.loc[measured[1], numbers], table.loc[measured[-1], numbers] = np.nan, np.inf
    for column in ("why", "claim", "note"):
        if column in table and (filled := table[column].notna() & (table[column] != "")).any():
            table.loc[filled, column] = HOSTILE
    return table


@pytest.mark.parametrize("name", READS)
def test_draws_in_its_own_style_with_nan_infinity_and_hostile_text(name, study):
    tables = [spoilt(study[t]) for t in READS[name]]
    before = [t.copy() for t in tables]
    with plt.rc_context({"font.size": 21, "text.parse_math": True}):
        settings = dict(plt.rcParams)
        fig = draw(name, *tables)
        assert plt.get_fignums() == [fig.number] and dict(plt.rcParams) == settings
    fig.draw_without_rendering()
    assert all(t.equals(b) for t, b in zip(tables, before))
    for ax in fig.axes:
        named = ax.get_title(loc="left") or hasattr(ax, "_colorbar") or name == "amplification"
        assert named and all(np.isfinite(ax.get_xlim())) and all(np.isfinite(ax.get_ylim()))


def numbers_drawn(ax) -> list:
    "Everything that lines and interval strokes show, in order."
    lines = [(of.get_label(), np.round(np.asarray(of.get_xydata(), float), 9).tolist()) for of in ax.lines]
    segments = [s for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    return lines + [np.round(s, 9).tolist() for s in segments]


@pytest.mark.parametrize("name", ["damage", "recurrence"])
def test_csv_files_draw_what_the_study_draws(name, study):
    ours, theirs = (draw(name, *(form(study[t]) for t in READS[name])) for form in (lambda t: t, read_back))
    for a, b in zip(ours.axes, theirs.axes):
        assert numbers_drawn(a) == numbers_drawn(b) and a.get_title(loc="left") == b.get_title(loc="left")


COLUMN = {"recurrence": "similar", "sizes": "share", "factors": "difference"}


@pytest.mark.parametrize("name", READS)
def test_says_which_column_is_missing_and_leaves_no_figure(name, study):
    table, rest = study[READS[name][0]], [study[t] for t in READS[name][1:]]
    column = COLUMN.get(name, "damage")
    for wrong in (table.iloc[:0], table.drop(columns=column)):
        with pytest.raises(ValueError) as e:
            draw(name, wrong, *rest)
    assert column in str(e.value)
    if "arm" in table and name != "factors":
        with pytest.raises(ValueError):
            draw(name, table[table["arm"] == "unmasked"], *rest)
    with pytest.raises(ValueError) as e:
        paper_figure("no such figure", {}, PUBLISHED)
    assert e.value.argument == "name"


def said(ax) -> str:
    "All text in the axes, without its line breaks."
    return " ".join(" ".join(t.get_text() for t in ax.texts).split())


def line(ax, label: str):
    return next(of for of in ax.lines if str(of.get_label()).startswith(label))


def triangles(ax) -> list:
    return [tuple(xy) for of in ax.lines if of.get_marker() in ("v", "^") for xy in of.get_xydata().tolist()]


def test_figure_3_shows_the_study_beside_the_paper(study):
    table = study["preservation"]
    fig = draw("fig-3-preservation", table)
    paper_panel, here = fig.axes[:2]
    rows = table[(table.measure == "nats") & table.fraction.isna() & (table.note.isna() | (table.note == ""))]
    for label, arm, late in (
        ("networks, correct", "keep key", False),
        ("networks, late", "keep key", True),
        ("random, correct", "keep random", False),
    ):
        of = rows[(rows.arm == arm) & (rows.late_binding.astype(str) == str(late))]
        assert np.allclose(line(here, label).get_xydata(), of[["k", "recovered"]].to_numpy(float))
    runs = PUBLISHED["preservation"].query("model == 'GPT-2'").pivot(index="k", columns="task", values="score")
    normal = PUBLISHED["ablation"].query("model == 'GPT-2' and arm == 'unmasked'").set_index("task")["score"]
    assert np.allclose(line(paper_panel, "GPT-2").get_ydata(), (runs / normal).median(axis=1).astype(float))


def places(ax) -> list:
    "Where marks really stand, in pixels."
    ax.figure.draw_without_rendering()
    shown = lambda of: np.arange(len(of.get_xdata())) if of.get_markevery() is None else of.get_markevery()
    marked = [of for of in ax.lines if of.get_marker() not in ("None", None, "", "x")]
    return [tuple(xy) for of in marked for xy in of.get_transform().transform(of.get_xydata()[shown(of)]).tolist()]


def test_no_value_of_figure_3_is_lost_and_none_hides_another(study):
    table = study["preservation"].copy()
    over_k = table.fraction.isna() & table.arm.isin(["keep key", "keep random"]) & (table.measure == "nats")
    table.loc[over_k & (table.k == 64), "recovered"] = -7.0  # four arms at one place, below
    table.loc[over_k & (table.k == 128), "recovered"] = 0.5  # and within
    table.loc[over_k & (table.k == 256), "recovered"] = 3.0  # and above
    ax = curves.plot_preservation(table, PUBLISHED, limits=(-0.4, 1.5)).axes[1]
    assert sorted(y for _, y in triangles(ax)) == [-0.4] * 4 + [1.5] * 4
    assert "8 values beyond the axis, from −7 to 3" in said(ax)
    rows = int((over_k & table.note.fillna("").eq("")).sum())
    at = np.array(places(ax))
    assert len(at) == rows
    apart = np.abs(at[:, None] - at[None]).max(-1) + 99 * np.eye(len(at))
    assert apart.min() > 1, "two marks stand on the same pixels"
    assert ax.get_window_extent().padded(1).count_contains(at) == rows, "a mark lies outside of the panel"
    assert triangles(curves.plot_preservation(table, PUBLISHED, limits=(-8, 4)).axes[1]) == []


def test_over_draws_the_mean_and_the_widest_interval(study):
    table = study["damage"]
    fig = draw("damage", table)
    rows = table[(table.arm == "random") & (table.fraction == 0.01)]
    ax = fig.axes[0]
    assert dict(line(ax, "random").get_xydata())[0.01] == pytest.approx(rows.damage.mean())
    segments = [s for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    strokes = {tuple(np.round(s[:, 1], 9)) for s in segments}
    assert (round(rows.ci_low.min(), 9), round(rows.ci_high.max(), 9)) in strokes
    norm = dict(line(fig.axes[1], "key").get_xydata())
    assert norm == pytest.approx(dict(table[table.arm == "key"][["injected", "damage"]].to_numpy(float)))
    gone = table.assign(damage=table.damage.where(table.arm != "PCA"), injected=np.nan)
    left = draw("damage", gone).axes[1]
    assert "PCA (5 times)" in said(left) and "no norm" in said(left)


def test_gain_one_and_nothing_added_change_nothing(study):
    fig = draw("amplification", study["amplification"])
    for ax, x in zip(fig.axes, (1.0, 1.0, 0.0)):
        assert dict(line(ax, "key").get_xydata())[x] == 0.0
    rows = study["amplification"].query("arm == 'key' and measure == 'nats' and replace == 'mean' and add_sd == 0")
    drawn = dict(line(fig.axes[1], "key").get_xydata())
    assert drawn == pytest.approx(dict(rows[["gain", "damage"]].to_numpy(float)) | {1.0: 0.0})


def test_each_network_beside_its_own_draws_and_the_p_value_of_its_texts(study):
    table, contrasts = study["networks"], study["contrasts"]
    ax = draw("networks", table, contrasts).axes[1]
    draws = table[(table.arm == "random") & (table.network == 4) & (table.measure == "nats")].damage.tolist()
    strokes = [xy for of in ax.lines if of.get_marker() == "|" and of.get_markersize() < 10 for xy in of.get_xydata()]
    assert sorted(x for x, y in strokes if y == 4) == sorted(draws)
    own = contrasts.query("study == 'networks' and network == 4 and measure == 'nats' and against == 'random'")
    label = ax.get_yticklabels()[4].get_text()
    assert label == f"4: 13 units, p {own.p.iloc[0]:.2g}"
    elsewhere = contrasts.assign(data=contrasts.data.where(contrasts.study != "networks", "other texts"))
    assert "p" not in draw("networks", table, elsewhere).axes[1].get_yticklabels()[4].get_text()


def test_cross_task_cells_stand_where_they_were_found_and_measured(study):
    table = study["cross-task"]
    ax = draw("cross-task", table.sample(frac=1, random_state=0)).axes[0]
    rows, columns = ([t.get_text() for t in of] for of in (ax.get_yticklabels(), ax.get_xticklabels()))
    key = table[table.arm == "key"].assign(data=lambda t: t.data.str.removesuffix(", short"))
    key, shown = key.set_index(["found_on", "data"]).damage, ax.images[0].get_array()
    assert len(rows) == len(columns) == 4
    assert all(shown[i, j] == pytest.approx(key[r, c]) for i, r in enumerate(rows) for j, c in enumerate(columns))


def test_rows_on_other_texts_are_left_out_and_counted(study):
    contrasts = study["contrasts"].copy()
    other = contrasts.study.eq("factors") & contrasts.setting.isin(["k 10", "k 64"])
    contrasts.loc[other, "data"] = "other texts"
    ax = draw("factors", contrasts).axes[0]
    rows = [t.get_text().split(":")[0] for t in ax.get_yticklabels()]
    assert "baseline" in rows and not {"k 10", "k 64"} & set(rows) and "2 settings" in said(ax)
    share = study["random share"].assign(data="other sentences")
    tasks = draw("masked-tasks", study["union"], share).axes[-1]
    assert "random 15 %" not in [t.get_text().split("\n")[0] for t in tasks.get_yticklabels()]
    assert "random 15 %" in said(tasks)
    apart = draw("subtraction", study["subtraction"], study["networks"].assign(data="other texts")).axes[0]
    strokes = [x for of in apart.lines if of.get_marker() == "|" for x in of.get_xdata()]
    assert strokes == [] and "random neurons" in said(apart)


def test_a_row_of_selections_counts_the_draws_that_it_shows(study):
    ax = draw("selections", study["union"].query("measure == 'nats'")).axes[0]
    rows = {t.get_text().split("\n")[0]: t.get_text().split("\n")[1] for t in ax.get_yticklabels()}
    assert rows["random"] == "461 units, 3 draws" and rows["matched permuted"].startswith("461 units, 1 draw, ")
    assert "top variance, by layer" in rows


def test_an_arm_has_a_look_of_its_own():
    from llmfact_nb.show.drawing import ARM_LOOKS, in_order, looks

    assert len({colour for colour, _, _ in ARM_LOOKS.values()}) == len(ARM_LOOKS)
    selections = [look[1:] for arm, look in ARM_LOOKS.items() if not arm.startswith("keep")]
    assert len(set(selections)) == len(selections)
    assert looks("keep PCA") == looks("PCA") and looks("keep key") != looks("key")
    assert in_order(["random", "keep key", "key", "unknown"]) == ["key", "random", "keep key", "unknown"]


@pytest.mark.parametrize("number", range(1, 11))
def test_a_table_is_compact_has_numbers_of_both_and_no_column_of_empty_cells(number, study):
    table = paper.paper_table(number, study, PUBLISHED)
    assert not table.isin(["", "–"]).all().any() and not table.isna().all().any() and "arXiv" in table.attrs["source"]
    assert f"Table {number}:" in table.attrs["title"] and table.shape[1] <= 9
    both = {"published", "here"}
    assert both <= {c.split(":")[0] for c in table} | set(table.get("source", [])), "published beside here"
    bare = paper.paper_table(number, {}, PUBLISHED)
    assert not bare.isna().all().any() and "here" not in {c.split(":")[0] for c in bare} | set(bare.get("source", []))
    read = {name: read_back(of) for name, of in study.items()}
    pd.testing.assert_frame_equal(paper.paper_table(number, read, PUBLISHED), table, check_dtype=False)
    html = render_table(table)
    assert html.count("<tr>") == len(table) + 1


def number_in(cell: str) -> list[float]:
    "The numbers of a cell: the value, then the ends of its interval."
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-\d+)?", cell.replace("−", "-"))]


def test_tables_hold_published_numbers_and_the_studys(study):
    one, four, six, ten = (paper.paper_table(n, study, PUBLISHED) for n in (1, 4, 6, 10))
    of = one.set_index("texts")
    assert of.loc["code", "published"] == pytest.approx(10.21)
    counts = study["recurrence"].query("method == 'ICA' and texts == 'code'")
    assert of.loc["code", "here: ICA"] == pytest.approx(counts.similar.sum() / counts.text.nunique(), abs=0.006)
    assert four["published: units"].sum() == 366
    assert four["published: accuracy falls by, points"].max() == pytest.approx(100 * (0.8614 - 0.5749))
    draws = study["networks"].query("arm == 'random' and network == 7 and measure == 'nats'").damage
    assert four.loc[7, "here: random, highest"] == pytest.approx(draws.max(), abs=6e-5)
    alone = study["networks"].query("arm == 'network' and network == 7 and measure == 'nats'").iloc[0]
    assert number_in(four.loc[7, "here: damage"]) == pytest.approx(
        [alone.damage, alone.ci_low, alone.ci_high], abs=6e-5
    )
    tasks = six.set_index("task")
    assert tasks.loc["SST-2, accuracy", ["unmasked", "networks masked"]].tolist() == [0.844, "0"]
    key = study["union"].query("arm == 'key' and measure == 'accuracy'").iloc[0]
    ours = six[six.task.str.startswith(f"{key.data}, accuracy")].iloc[0]
    ends = [key.unmasked - key.ci_high, key.unmasked - key.ci_low]
    assert number_in(ours["networks masked"]) == pytest.approx([key.value, *ends], rel=0.01)
    kept = ten.set_index(["source", "score"])
    assert kept.loc[("published", "MRPC"), ["unmasked", "k = 512"]].tolist() == [0.8161, 0.8162]
    assert kept.loc[("published", "most units kept"), "k = 10"] == pytest.approx(3399 / 114_688, abs=6e-4)
    late = study["preservation"].query("arm == 'keep key' and k == 128 and late_binding and measure == 'nats'").iloc[0]
    assert kept.loc[("here", "gap recovered: networks, late-bound masks"), "k = 128"] == round(late.recovered, 3)
    share = kept.loc[("here", "units kept: networks, late-bound masks"), "k = 128"]
    assert share == pytest.approx(1 - late.share, abs=6e-4)


def test_random_15_percent_stands_only_beside_rows_on_the_same_sentences(study):
    cell = lambda share: (
        paper.paper_table(5, study | {"random share": share}, PUBLISHED)
        .query("source == 'here' and task.str.contains('accuracy')")["large share at random"]
        .iloc[0]
    )
    share = study["random share"]
    of = share.query("measure == 'accuracy' and replace == 'zero' and data == 'sentences' and fraction == 0.15")
    assert number_in(cell(share)) == pytest.approx([of.value.mean(), 15], rel=0.01)
    assert cell(share.assign(data="other")) == "–"


def test_other_numbers_are_refused():
    for wrong in (0, 11, "4"):
        with pytest.raises(ValueError) as e:
            paper.paper_table(wrong, {}, PUBLISHED)
        assert e.value.argument == "number"


def test_rendered_tables_are_harmless():
    text = render_table(paper.generation_table(SAMPLES))
    assert not any(evil in text for evil in ("<b>", "\x1b", "\u202e")) and "&lt;b&gt;" in text
    assert text.count("<td") == 6 * 2 and text.count('scope="rowgroup"') == 3


def test_claims_stand_in_words_with_their_interval(study):
    claims, verdicts = paper.verdict_frame(study["verdicts"]), study["verdicts"]
    assert all(row.claim == f"{of.claim} ({of.id})" for row, of in zip(claims.itertuples(), verdicts.itertuples()))
    known = verdicts.here.notna() & np.isfinite(verdicts.ci_low)
    assert all(len(number_in(cell)) == 3 for cell in claims.here[known])


def test_everything_at_once_says_what_is_missing_and_leaves_nothing_old(tmp_path, study):
    tables = {name: spoilt(study[name]) for name in ("verdicts", "subtraction")}
    tables |= {"union": study["union"].drop(columns="damage"), "damage": study["damage"].iloc[:0]}
    (tmp_path / "selections.png").write_bytes(b"old")
    (tmp_path / "mine.png").write_bytes(b"mine")
    drawn = draw_paper(tables, tmp_path, PUBLISHED, samples=SAMPLES, title="of <model>", dpi=40)
    assert set(drawn) == {p.name for p in tmp_path.iterdir()} - {"mine.png"}
    assert all(drawn[name] == tmp_path / name for name in drawn) and not set(drawn) & set(drawn.missing)
    there = "fig-1-scheme.png late-binding.png subtraction.png table-01.csv table-10.csv generations.csv verdicts.csv"
    assert {*there.split(), "index.html"} <= set(drawn)
    lacking = {"selections.png": "damage", "recurrence.png": "recurrence", "fig-2-maps.png": "baseline"}
    assert all(what in drawn.missing[name] for name, what in lacking.items()) and "damage.png" in drawn.missing
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "of &lt;model&gt;" in page and "<b>|" not in page
    assert all(name in page for name in [*drawn.missing, *(n for n in drawn if n.endswith(".png"))])
    assert plt.get_fignums() == [] and (tmp_path / "subtraction.png").read_bytes()[:4] == b"\x89PNG"


def test_every_file_of_a_quick_study_says_that_it_is_quick(tmp_path, study):
    mark, tables = "quick: for trying out", {name: study[name] for name in ("subtraction", "verdicts", "recurrence")}
    plain = draw_paper(tables, tmp_path / "plain", PUBLISHED, samples=SAMPLES, dpi=40)
    drawn = draw_paper(tables, tmp_path / "quick", PUBLISHED, samples=SAMPLES, mark=mark, dpi=40)
    assert set(drawn) == set(plain) and len(drawn) > 14
    for name, path in drawn.items():
        if name.endswith(".png"):
            assert path.read_bytes() != plain[name].read_bytes(), name
            red = plt.imread(path)[:12, -120:, :3] @ [1, -1, -1]
            assert (red > 0.2).any(), f"{name} bears no mark"
        elif name.endswith(".csv"):
            assert (pd.read_csv(path)["mark"] == mark).all() and "mark" not in pd.read_csv(plain[name])
    page = drawn["index.html"].read_text(encoding="utf-8")
    assert page.count(mark) == 1 + sum(name.endswith(".csv") for name in drawn), "on the page and on each table"
