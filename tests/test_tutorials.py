"""Pins what holds for every tutorial (it opens in Colab, it can be run with and without its slow cells, its links lead
somewhere), the names in the llmfact dictionary, and the README's code."""

import ast
import inspect
import json
import re
import subprocess
from pathlib import Path

import pytest

import llmfact_nb

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "nbs" / "tutorials"
TUTORIALS = sorted(p.name for p in FOLDER.glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/llmfact-nb/llmfact_nb/blob/main/nbs/tutorials/"


def cells(name: str) -> list[tuple[str, str]]:
    "(kind, source) of each cell."
    return [
        (c["cell_type"], "".join(c["source"])) for c in json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]
    ]


def test_the_promised_tutorials_are_there():
    assert {
        "quickstart.ipynb",
        "functional_networks.ipynb",
        "paper_figures.ipynb",
        "selective_finetuning.ipynb",
        "laptop_to_cluster.ipynb",
        "coming_from_llmfact.ipynb",
    } <= set(TUTORIALS)


@pytest.mark.parametrize("name", TUTORIALS)
def test_opens_in_colab(name, monkeypatch):
    kinds, sources = zip(*cells(name))
    top = "\n".join(sources[:3])
    assert re.findall(rf"{re.escape(COLAB)}\w+\.ipynb", top) == [COLAB + name], "one link to itself, at the top"
    code = [s for k, s in zip(kinds, sources) if k == "code"]
    install = next(i for i, s in enumerate(code) if "pip" in s and "find_spec" in s)
    assert not any("llmfact_nb import" in s for s in code[:install]), "the package is imported before it is installed"

    def run(*args, **kwargs):
        raise AssertionError("something is installed though the package is there")

    monkeypatch.setattr(subprocess, "run", run)
    exec(code[install], {})  # where the package can be imported, the cell does nothing
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssertionError):
        exec(code[install], {})
    assert not any("#| export" in s for s in code), "a tutorial exports nothing"
    assert (FOLDER / name).stat().st_size < 700_000


@pytest.mark.parametrize("name", TUTORIALS)
def test_links_lead_somewhere(name):
    for kind, source in cells(name):
        for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", source) if kind == "markdown" else ():
            assert (FOLDER / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("name", TUTORIALS)
def test_quick_cells_need_no_slow_ones(name):
    "`make test` leaves out the cells flagged slow; what the others use must not come from them."
    from_slow = set()  # made, or made anew, by a slow cell
    for kind, source in cells(name):
        if kind != "code":
            continue
        names = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)]
        made = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        made |= {n.name for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        made |= {
            (a.asname or a.name).split(".")[0]
            for n in ast.walk(ast.parse(source))
            if isinstance(n, (ast.Import, ast.ImportFrom))
            for a in n.names
        }
        if "#| slow" in source:
            from_slow |= made
        else:
            from_slow -= made
            assert not {n.id for n in names if isinstance(n.ctx, ast.Load)} & from_slow, source


def dictionary() -> list[list[str]]:
    "The rows of the tables: [llmfact, here, difference]."
    text = "\n".join(s for k, s in cells("coming_from_llmfact.ipynb") if k == "markdown" and "| llmfact | here |" in s)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if "llmfact" not in row[0] and "---" not in row[0]]


def test_every_name_of_llmfact_is_in_the_dictionary():
    theirs = " ".join(row[0] for row in dictionary())
    asked = """AttentionLayerAnalysis CanICA ConvBlock ConvDown ConvUp Decoder Encoder FBNExtractor FBNFeatureExtractor
        FastICA GroupFBNFeatureExtractor IoU LLMFBNAnalysis LLMFC LLaMASTCA LayerBiasCompute LayerOutputExtractor
        MLPLayerAnalysis MaskedGPT2AmplifiedForSequenceClassification MaskedGPT2ForSequenceClassification
        MaskedGPT2LMModel MaskedGPT2Model MaskedModel MutiICA MutiLayerAnalysis MutiLayerAnalysis2 PrunedConv1D
        PrunedGLMModel PrunedGPT2Model PrunedLlamaMLP PrunedLlamaModel PrunedQwen2MLP PrunedQwenModel STCA SingleICA
        SingleLayerAnalysis SingleLayerAnalysisGPU SpatialAttention StatDictionaryLearning StatICA _cube _exp _ica_par
        _logcosh _sym_decorrelation apply_mask_and_average apply_mask_any bf16_to_numpy compute_all_fbn compute_mask
        compute_matrix compute_pcc correlation_activation countSimilarity cut_par_num evaluate_iou extract_features
        extract_layer_outputs
        fastica flip get_fbn_for_pruner get_mask_index load_fbn_for_pruner load_model mask_hidden_states plot
        process_layer pruned_glm_mlp pruned_gpt2_mlp_1 pruned_gpt2_mlp_2 pruned_llama_attention pruned_llama_mlp
        pruned_qwen_mlp register_hooks remove_hooks resample_v save_fbn selfSimilarity setup_seed
        threshold_muti_layer thresholding write_layer_txt z_score_signals"""
    assert len(asked.split()) == 83
    assert [name for name in asked.split() if not re.search(rf"\b{name}\b", theirs)] == []


def test_every_name_of_ours_exists():
    from llmfact_nb.masks import NeuronMask
    from llmfact_nb.networks import NetworkMatch

    classes = [
        getattr(llmfact_nb, n)
        for n in ("Activations", "FunctionalNetworks", "GroupICA", "ICA", "MaskedModel", "NeuronMask")
    ] + [NetworkMatch, NeuronMask]
    seen = set()
    for _, here, _ in dictionary():
        for code in re.findall(r"`([^`]+)`", here):
            if not re.search(r"\w", code):  # an operator
                continue
            code = f"{code} pass" if code.startswith("with ") else f"networks{code}" if code.startswith(".") else code
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id != "model":
                    function = getattr(llmfact_nb, node.func.id)
                    parameters = inspect.signature(function).parameters.values()
                    unknown = {k.arg for k in node.keywords} - {p.name for p in parameters}
                    assert not unknown or (
                        any(p.kind is p.VAR_KEYWORD for p in parameters)
                        and unknown <= set(inspect.signature(llmfact_nb.ICA).parameters)
                    ), (code, unknown)
                    seen.add(node.func.id)
                elif isinstance(node, ast.Attribute) and not (
                    isinstance(node.value, ast.Name) and node.value.id in ("torch", "model", "scipy", "numpy")
                ):
                    kept = rf"self\.{node.attr}\b|\"{node.attr}\""  # what `fit` leaves behind
                    assert any(
                        hasattr(c, node.attr)
                        or node.attr in getattr(c, "__dataclass_fields__", ())
                        or re.search(kept, inspect.getsource(c))
                        for c in classes
                    ), code
    assert {"capture", "MaskedModel", "FunctionalNetworks", "functional_connectivity", "prune"} <= seen


def test_the_readme_is_short_and_has_the_sections_that_people_look_for():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text) <= 10_000
    assert re.findall(r"^## (.+)$", text, re.M) == [
        "Install",
        "Quick start",
        "Results",
        "How it compares",
        "Documentation",
        "Contributing",
        "Citation",
    ]
    for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.filterwarnings("ignore:FastICA has not converged")  # the stand-in's texts are random words
def test_the_readme_runs(tiny_model, tiny_tokenizer, monkeypatch, capsys):
    """The README's code as written, on a stand-in for the model and the texts. `nbdev_test` runs the same cells on the
    real ones."""
    import families

    model = tiny_model("llama")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2 and len(blocks[0].splitlines()) <= 10, "ten lines, as the heading says"
    monkeypatch.setattr(llmfact_nb, "load_model", lambda name: (model, tiny_tokenizer()))
    monkeypatch.setattr(
        llmfact_nb, "load_texts", lambda name, split, n: [families.words(60, seed) for seed in range(n)]
    )
    before, names = families.state(model), {}
    exec(blocks[0], names)
    assert capsys.readouterr().out.strip(), "the masked model has written something"
    assert names["key"].n == 1 and names["networks"].maps_.shape == (16, 72)
    assert families.state(model) == before
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    exec(blocks[1], names)
    moved = {n for n, p in model.named_parameters() if not p.equal(weights[n])}
    assert moved and all(".mlp." in n for n in moved), "only the key neurons have learned"
