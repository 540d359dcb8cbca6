"""Pins that what used to give wrong numbers without a word is right or refused: hooks that do not run, or run twice;
weights that are not what their name says; copies that compute with the original; padding that reaches real tokens."""

import contextlib
import copy
import functools
import threading
import types
import warnings

import architectures
import families
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from architectures import ALWAYS, IDS, Subject, answer, close
from families import LAYERS
from torch import nn
from torch.nn.utils import parametrizations, prune
from refusals import refused

from llmfact_nb.activations import capture
from llmfact_nb.base.arguments import ArgumentError
from llmfact_nb.evaluate import perplexity
from llmfact_nb.finetune import neuron_training
from llmfact_nb.masked_model import MaskedModel
from llmfact_nb.masks import NeuronMask
from llmfact_nb.sites import neuron_sites
from llmfact_nb.tuning.gates import NeuronGate

DENSE = [n for n in ALWAYS if n not in families.REFUSED]
TEXTS = [families.words(9, 1), families.words(4, 2), families.words(6, 3)]


def subject(name="llama", **config):
    s = Subject(name, families.build(name, **config))
    return s, s.mask("mlp_hidden")


def ways(s, mask):
    "Each way of reading or changing a site, as a function that runs the model once."

    def within(block):
        with block:
            answer(s.model)

    mm = MaskedModel(s.model)
    return {
        "capture": lambda: capture(s.model, families.tokenizer(), TEXTS, "mlp_hidden", progress=False),
        "ablate": lambda: within(mm.ablate(mask)),
        "keep": lambda: within(mm.keep(mask)),
        "amplify": lambda: within(mm.amplify(mask, gain=2.0)),
        "gates": lambda: within(NeuronGate(mask).attached(s.model)),
    }


def refused_everywhere(s, mask, word=""):
    before = families.state(s.model)
    for name, run in ways(s, mask).items():
        with refused(ValueError, word):
            run()
            pytest.fail(f"{name}: accepted")
        assert families.state(s.model) == before, name


# Did the hook run, once?


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("name", DENSE)
def test_a_block_that_runs_never_or_twice_is_named(name, times):
    s, mask = subject(name)
    path, down = s.down[1]
    s.model.config.use_cache = False  # a block that runs twice would fill its cache twice
    block = s.model.get_submodule(next(p for p in _prefixes(path) if p.endswith(".1")))
    whole, outputs = block.forward, []
    handle = block.register_forward_hook(lambda m, a, out: outputs.append(out))
    answer(s.model)
    handle.remove()

    def twice(self, *args, **kwargs):
        whole(*args, **kwargs)
        return whole(*args, **kwargs)

    def never(self, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *outputs[0][1:]) if isinstance(outputs[0], tuple) else x

    block.forward = types.MethodType(twice if times else never, block)
    refused_everywhere(s, mask, path)


def test_a_block_changed_after_a_first_capture_is_noticed():
    s, mask = subject()
    run = ways(s, mask)["capture"]
    run()
    mlp = s.model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = types.MethodType(lambda self, x: whole(x) + whole(x), mlp)
    with refused(ValueError, "layers.1.mlp.down_proj"):
        run()


def _prefixes(path):
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def test_a_parent_that_reads_the_weight_itself():
    s, mask = subject()

    def fused(self, x):
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    for layer in s.model.model.layers:
        layer.mlp.forward = types.MethodType(fused, layer.mlp)
    refused_everywhere(s, mask, "layers.0.mlp.down_proj")


@pytest.mark.parametrize("part", ["", "model", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("called", [False, True])
def test_a_forward_compiled_on_the_instance(part, called):
    s, mask = subject()
    module = s.model.get_submodule(part)
    module.forward = torch.compile(module.forward, backend="eager")
    if called:
        answer(s.model)
    refused_everywhere(s, mask, "compile")


def test_a_block_that_the_model_never_entered_is_told():
    "A function that torch.compile has compiled before, or a copy: the mask is not in it."
    s, mask = subject()
    compiled, other = torch.compile(lambda ids: s.model(ids).logits, backend="eager"), copy.deepcopy(s.model)
    with torch.no_grad():
        compiled(IDS)
    for run in (lambda: compiled(IDS), lambda: answer(other)):
        with torch.no_grad(), pytest.warns(UserWarning), MaskedModel(s.model).ablate(mask):
            run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with MaskedModel(s.model).ablate(mask):
            s.model.model.layers[0].mlp(torch.zeros(1, 2, families.D))


def test_an_outer_model_that_goes_around_the_inner_one():
    s, mask = subject()
    inner = s.model.model.forward
    s.model.forward = lambda input_ids=None, **kw: types.SimpleNamespace(logits=inner(input_ids).last_hidden_state)
    for name in ("ablate", "amplify", "gates"):
        with refused(ValueError, "down_proj", argument="site"):
            ways(s, mask)[name]()


def test_chunked_feed_forwards_run_often_and_are_right():
    "Stated exception: BERT's blocks can call their MLP once for each part of a text."
    s, mask = subject("bert")
    zeroed = answer(s.zeroed(mask))
    chunked = Subject("bert", families.build("bert", chunk_size_feed_forward=1))
    chunked.model.load_state_dict(s.model.state_dict())
    with MaskedModel(chunked.model).ablate(mask):
        assert close(answer(chunked.model), zeroed)
    with pytest.raises(NotImplementedError):
        ways(chunked, mask)["capture"]()


def test_layers_dropped_in_training_are_no_error():
    s, mask = subject("opt", layerdrop=0.9)
    s.model.train()
    with MaskedModel(s.model).ablate(mask):
        for seed in range(5):
            torch.manual_seed(seed)
            s.model(input_ids=IDS)
    expected = answer(s.zeroed(mask).eval())
    s.model.eval()
    with MaskedModel(s.model).ablate(mask):
        assert close(answer(s.model), expected)


def test_a_pass_that_fails_says_why_it_failed():
    "The check is no noise on top of another error."
    s, mask = subject()
    expected = answer(s.zeroed(mask))
    handle = s.model.model.layers[1].register_forward_pre_hook(lambda *a: 1 / 0)
    with MaskedModel(s.model).ablate(mask):
        with pytest.raises(ZeroDivisionError):
            answer(s.model)
        handle.remove()
        assert close(answer(s.model), expected)  # and the next pass is a pass like any other


def test_other_ways_of_calling_are_right():
    "functional_call, jit tracing under the mask, a static cache, a call of the backbone, gradient checkpointing."
    s, mask = subject()
    expected = answer(s.zeroed(mask))
    with MaskedModel(s.model).ablate(mask), torch.no_grad():
        parameters = dict(s.model.named_parameters())
        assert close(torch.func.functional_call(s.model, parameters, (IDS,)).logits, expected)
        assert close(s.model.lm_head(s.model.model(IDS).last_hidden_state), expected)
        options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
        static = s.model.generate(IDS, cache_implementation="static", **options)
    assert torch.equal(static, s.zeroed(mask).generate(IDS, **options))
    s.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with MaskedModel(s.model).ablate(mask):
        s.model(input_ids=IDS, labels=IDS).loss.backward()
    hidden = s.model.model.layers[0].mlp.down_proj.weight.grad[:, mask.layers[0]]
    assert (hidden == 0).all()


def test_virtual_tokens_before_a_text_are_refused():
    "Logits would be read at the wrong places."
    peft = pytest.importorskip("peft")
    how = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model, t = peft.get_peft_model(families.build("llama"), how), families.tokenizer()
    with pytest.raises(TypeError):
        perplexity(model, t, TEXTS, progress=False)
    with pytest.raises(NotImplementedError):
        capture(model, t, TEXTS, progress=False)
    with model.disable_adapter():
        assert perplexity(model, t, TEXTS, progress=False).nats > 0


@pytest.mark.parametrize("targets", [["down_proj"], "all-linear"])
def test_adapters_under_the_check(targets):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(families.build("llama"), peft.LoraConfig(r=2, target_modules=targets))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.requires_grad else None
    s, mask = (Subject("llama", model), Subject("llama", families.build("llama")).mask("mlp_hidden"))
    plain = answer(model)
    for run in ways(s, mask).values():
        run()
    assert torch.equal(answer(model), plain)


def test_two_threads_in_one_model_are_told():
    "They would count and write into each other's hooks; one after the other is fine, also from another thread."
    s, mask = subject()
    expected, entered, go_on, found = answer(s.zeroed(mask)), threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            go_on.wait(20)

    with MaskedModel(s.model).ablate(mask):
        handle = s.model.model.layers[1].register_forward_pre_hook(wait)
        other = threading.Thread(target=lambda: found.append(answer(s.model)))
        other.start()
        entered.wait(20)
        with refused(argument="model"):
            answer(s.model)
        go_on.set()
        other.join()
        handle.remove()
        assert close(found[0], expected) and close(answer(s.model), expected)


def test_data_parallel_is_refused_by_name():
    wrapped, t = nn.DataParallel(families.build("llama")), families.tokenizer()
    with refused(NotImplementedError, "DataParallel"):
        capture(wrapped, t, TEXTS, progress=False)
    with refused(TypeError, "DataParallel"):
        perplexity(wrapped, t, TEXTS, progress=False)


@pytest.fixture
def one_process():
    "A group of one process, as torch.distributed wants it."
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["wrapped", "wrapped, plain names", "sharded"])
def test_models_in_parts_are_read_right_and_not_written_to(kind, one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    s, mask = subject()
    t, expected, model = families.tokenizer(), answer(s.zeroed(mask)), copy.deepcopy(s.model)
    if kind == "sharded":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        names = kind == "wrapped, plain names"
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=names)
    read = lambda of: capture(of, t, TEXTS, "mlp_hidden", progress=False).values
    assert close(read(model), read(s.model))
    loss = lambda of: perplexity(of, t, TEXTS, progress=False).nats
    assert loss(model) == pytest.approx(loss(s.model), abs=1e-4)
    with MaskedModel(model).ablate(mask):
        assert close(answer(model), expected)
    for write in (lambda: MaskedModel(model).bake(mask), lambda: neuron_training(model, mask).__enter__()):
        with refused(ValueError, "layers.0", argument="model"):
            write()


def test_a_copy_or_file_made_under_a_mask_is_told(tmp_path):
    "A copy would stay masked for good; the file holds the weights without the mask."
    s, mask = subject()
    with MaskedModel(s.model).ablate(mask):
        answer(s.model)
        with pytest.raises(TypeError):
            copy.deepcopy(s.model)
        with pytest.warns(UserWarning):
            s.model.save_pretrained(tmp_path)
        baked = MaskedModel(s.model).bake(mask)
    assert close(answer(baked), answer(s.zeroed(mask)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.model.save_pretrained(tmp_path)


def test_bake_under_autocast_compares_in_full_precision():
    "Autocast remembers rounded weights, so that the copy would answer with the old ones."
    s, mask = subject()
    with torch.autocast("cpu", torch.bfloat16):
        answer(s.model)
        baked = MaskedModel(s.model).bake(mask)
    assert close(answer(baked), answer(s.zeroed(mask)))


# Weights that are not what their name says.


def right_or_refused(s, mask):
    "Bake gives the masked model's answer, or refuses."
    with MaskedModel(s.model).ablate(mask):
        masked = answer(s.model)
    before = families.state(s.model)
    try:
        baked = MaskedModel(s.model).bake(mask)
    except ValueError as e:
        assert families.state(s.model) == before
        return str(e)
    assert close(answer(baked), masked)
    return "right"


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": lambda m: nn.utils.weight_norm(m),
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_parametrised_weights_are_refused(wrap):
    s, mask = subject()
    wrap(s.model.model.layers[1].mlp.down_proj)
    assert "layers.1.mlp.down_proj" in right_or_refused(s, mask)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_parametrised_weights_elsewhere_do_not_matter(wrap):
    s, mask = subject()
    wrap(s.model.model.layers[1].mlp.up_proj)
    assert right_or_refused(s, mask) == "right"


@pytest.mark.parametrize("name", DENSE)
def test_weights_shared_between_layers_are_refused(name):
    s, mask = subject(name)
    (first, a), (second, b) = s.down[:2]
    b.weight = a.weight
    some = NeuronMask.from_layers([row if i < 1 else row & False for i, row in enumerate(mask.layers)], "mlp_hidden")
    words = right_or_refused(s, some)
    assert first in words and second in words


def test_a_view_of_another_weight_is_shared_too():
    s, mask = subject()
    mlp = s.model.model.layers[1].mlp
    mlp.down_proj.weight = nn.Parameter(mlp.up_proj.weight.detach().T)
    assert "up_proj" in right_or_refused(s, mask)


@pytest.mark.parametrize("where", ["", "model", "model.layers.1", "lm_head"])
def test_functions_set_on_instances_are_not_copied(where):
    s, mask = subject()
    module = s.model.get_submodule(where)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with refused(ValueError, where or "forward", argument="model"):
        MaskedModel(s.model).bake(mask)


def test_bound_methods_and_partials_are_copied_right():
    s, mask = subject()
    layer = s.model.model.layers[1]
    layer.forward = types.MethodType(type(layer).forward, layer)
    mlp = layer.mlp
    mlp.forward = functools.partial(type(mlp).forward, mlp)
    assert right_or_refused(s, mask) == "right"


def test_a_copy_that_answers_otherwise_is_refused():
    "Whatever the reason: here the module computes with a second copy of its weight."

    class Cached(nn.Linear):
        def forward(self, x):
            if not hasattr(self, "held"):
                self.held = [self.weight.detach().clone()]
            return F.linear(x, self.held[0])

    s, mask = subject()
    for layer in s.model.model.layers:
        layer.mlp.down_proj.__class__ = Cached
    answer(s.model)
    assert right_or_refused(s, mask) != "right"


@pytest.mark.parametrize("kind", ["quantised", "meta", "half"])
def test_weights_of_another_kind(kind):
    s, mask = subject()
    down = s.model.model.layers[1].mlp.down_proj
    if kind == "half":
        s.model.to(torch.bfloat16)
        assert MaskedModel(s.model).bake(mask).dtype == torch.bfloat16
        return
    if kind == "meta":
        down.weight = nn.Parameter(torch.empty_like(down.weight, device="meta"))
    else:
        down.weight = nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with refused(ValueError, "layers.1.mlp.down_proj"):
        MaskedModel(s.model).bake(mask)


# A batch reads as its texts do alone.


READ_AGAIN = {
    "bidirectional gemma": ("gemma", dict(use_bidirectional_attention=True)),
    "bidirectional llama": ("llama", dict(is_causal=False)),
    "gpt2": ("gpt2", {}),
    "bloom": ("bloom", {}),
    "bert": ("bert", {}),
    "opt": ("opt", {}),
}


@pytest.mark.filterwarnings("ignore:.*reads texts otherwise")
@pytest.mark.parametrize("name, config", READ_AGAIN.values(), ids=READ_AGAIN)
def test_a_capture_does_not_depend_on_the_batch(name, config):
    model, tokenizer = families.build(name, **config), families.tokenizer()
    alone = [capture(model, tokenizer, [t], "mlp_hidden", progress=False).values for t in TEXTS]
    together = capture(model, tokenizer, TEXTS, "mlp_hidden", batch_size=3, progress=False).values
    assert close(together, torch.cat(alone))


# Small mercies.


def test_a_block_entered_twice_is_named_and_may_be_used_again():
    s, mask = subject()
    block, expected = MaskedModel(s.model).ablate(mask), answer(s.zeroed(mask))
    with block:
        with pytest.raises(ValueError):
            block.__enter__()
        assert close(answer(s.model), expected)
    with block:
        assert close(answer(s.model), expected)


def test_numpy_values_are_taken_and_masked_arrays_refused():
    s, mask = subject()
    mm, values = MaskedModel(s.model), torch.linspace(-1, 1, mask.n_neurons)
    for make in (
        lambda v: mm.ablate(mask, replace=v),
        lambda v: mm.amplify(mask, gain=v),
        lambda v: mm.amplify(mask, add=v),
    ):
        with make(values):
            expected = answer(s.model)
        with make(values.numpy()):
            assert torch.equal(answer(s.model), expected)
        for bad in (np.ma.masked_array(values.numpy(), values.numpy() > 0), values.numpy()[:-1], values.tolist(), None):
            with pytest.raises(ArgumentError):
                make(bad)
    scores = np.ma.masked_array(values.numpy(), values.numpy() > 0)
    for reads in (lambda: NeuronMask.from_flat(scores > 0, mask.widths), lambda: mask.matched_random(0, scores)):
        with pytest.raises(ArgumentError):
            reads()


def test_swapped_model_and_tokenizer_are_named_and_a_processor_holds_a_tokenizer():
    model, tokenizer = families.build("llama"), families.tokenizer()
    with pytest.raises(TypeError):
        capture(tokenizer, model, TEXTS, progress=False)
    with pytest.raises(TypeError):
        MaskedModel(tokenizer)
    processor = types.SimpleNamespace(tokenizer=tokenizer)
    assert torch.equal(
        capture(model, processor, TEXTS, progress=False).values, capture(model, tokenizer, TEXTS, progress=False).values
    )


def test_a_matrix_that_does_not_fit_is_refused_before_the_first_pass(monkeypatch, tmp_path):
    from llmfact_nb import activations

    model, tokenizer = families.build("llama"), families.tokenizer()
    monkeypatch.setattr(activations, "free_memory", lambda: 1000)
    model.register_forward_pre_hook(lambda *a: pytest.fail("a pass"))
    with refused(ValueError, "path=", argument="path"):
        capture(model, tokenizer, TEXTS[:1] * 5, progress=False)


def test_a_conversation_rendered_to_text_has_one_first_token():
    model, tokenizer = families.build("llama"), families.tokenizer(special=True)
    first = tokenizer.bos_token
    with contextlib.suppress(AttributeError):
        plain = capture(model, tokenizer, [TEXTS[0]], progress=False)
        twice = capture(model, tokenizer, [f"{first} {TEXTS[0]}"], progress=False)
        assert plain.token_ids.tolist() == twice.token_ids.tolist()


def test_sites_stay_where_they_are_for_the_original():
    "Baking leaves the original's modules, and a copy of the copy is a copy."
    s, mask = subject()
    before = [x.module for x in neuron_sites(s.model)]
    again = copy.deepcopy(MaskedModel(s.model).bake(mask))
    assert [x.module for x in neuron_sites(s.model)] == before and len(neuron_sites(again)) == LAYERS
    assert architectures.close(answer(again), answer(s.zeroed(mask)))
