"""Tiny random models of many families, and where their down projections are: a table written down by hand, independent
of the package."""

import copy
from dataclasses import dataclass

import torch

D, HIDDEN, LAYERS, VOCAB, CONTEXT = 16, 24, 3, 48, 64


@dataclass(frozen=True)
class Family:
    "How to build a tiny model of one family, and what must be found in it."

    config: dict  # arguments of the configuration class
    down: str  # dotted name of the down projection in the base model, {} is the layer
    hidden: int = HIDDEN  # width of its input
    kind: str = "causal"  # "causal", "masked" or "base": the head it has
    square: dict | None = (
        None  # arguments that make the hidden width equal the model's width; None: the family has no such knob
    )


def _family(down: str, hidden: int = HIDDEN, kind: str = "causal", square: dict | None = None, **config) -> Family:
    return Family({"vocab_size": VOCAB, **config}, down, hidden, kind, square)


_BASIC = dict(
    hidden_size=D,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    max_position_embeddings=CONTEXT,
)
_GROUPED = dict(_BASIC, num_key_value_heads=1)
_WIDE = dict(_GROUPED, head_dim=8)
_SLIDING = dict(_WIDE, sliding_window=4)  # shorter than the test texts, so that the cache really slides
_GPT2 = dict(n_embd=D, n_inner=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=CONTEXT)
_SQ = dict(intermediate_size=D)
_LLAMA, _BERT = "layers.{}.mlp.down_proj", "encoder.layer.{}.output.dense"

# The families that the package promises.
NAMED = {
    "gpt2": _family("h.{}.mlp.c_proj", square=dict(n_inner=D), **_GPT2),
    "gpt_neox": _family("layers.{}.mlp.dense_4h_to_h", square=_SQ, **_BASIC),
    "opt": _family(
        "decoder.layers.{}.fc2",
        square=dict(ffn_dim=D),
        hidden_size=D,
        ffn_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=D,
        pad_token_id=0,
    ),
    "bloom": _family("h.{}.mlp.dense_4h_to_h", 4 * D, hidden_size=D, n_layer=LAYERS, n_head=2),
    "llama": _family(_LLAMA, square=_SQ, **_GROUPED),
    "mistral": _family(_LLAMA, square=_SQ, **_SLIDING),
    "qwen2": _family(_LLAMA, square=_SQ, **_GROUPED),
    "qwen3": _family(_LLAMA, square=_SQ, **_WIDE),
    "gemma3_text": _family(
        _LLAMA, square=_SQ, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_SLIDING
    ),
    "phi3": _family(_LLAMA, square=_SQ, pad_token_id=0, **_GROUPED),
    "falcon": _family(
        "h.{}.mlp.dense_4h_to_h",
        4 * D,
        square=dict(ffn_hidden_size=D),
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
    ),
    "gptj": _family("h.{}.mlp.fc_out", square=dict(n_inner=D), rotary_dim=4, **_GPT2),
    "bert": _family(_BERT, kind="masked", square=_SQ, **_BASIC),
    "roberta": _family(_BERT, kind="masked", square=_SQ, pad_token_id=0, **_BASIC),
}
# And more, to be sure that it was not tailored to those.
FURTHER = {
    "gpt_neo": _family(
        "h.{}.mlp.c_proj",
        square=_SQ,
        hidden_size=D,
        intermediate_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=2,
        attention_types=[[["global", "local", "global"], 1]],
        max_position_embeddings=CONTEXT,
        window_size=4,
    ),
    "mpt": _family("blocks.{}.ffn.down_proj", 4 * D, d_model=D, n_heads=2, n_layers=LAYERS, max_seq_len=CONTEXT),
    "gemma": _family(_LLAMA, square=_SQ, **_WIDE),
    "gemma2": _family(_LLAMA, square=_SQ, **_SLIDING),
    "phi": _family("layers.{}.mlp.fc2", square=_SQ, **_BASIC),
    "stablelm": _family(_LLAMA, square=_SQ, **_GROUPED),
    "starcoder2": _family("layers.{}.mlp.c_proj", square=_SQ, **_GROUPED),
    "cohere": _family(_LLAMA, square=_SQ, **_GROUPED),
    "olmo2": _family(_LLAMA, square=_SQ, **_GROUPED),
    "glm4": _family(_LLAMA, square=_SQ, pad_token_id=0, **_WIDE),
    "smollm3": _family(_LLAMA, square=_SQ, pad_token_id=0, **_GROUPED),
    "granite": _family(_LLAMA, square=_SQ, **_GROUPED),
    "codegen": _family("h.{}.mlp.fc_out", square=dict(n_inner=D), rotary_dim=4, **{**_GPT2, "n_head": 4}),
    "persimmon": _family("layers.{}.mlp.dense_4h_to_h", square=_SQ, **_BASIC),
    "nemotron": _family(_LLAMA, square=_SQ, **_GROUPED),
    "gpt_bigcode": _family("h.{}.mlp.c_proj", square=dict(n_inner=D), **_GPT2),
    "exaone4": _family(_LLAMA, square=_SQ, **_GROUPED),
    "apertus": _family(_LLAMA, square=_SQ, **_GROUPED),
    "lfm2": _family(
        "layers.{}.feed_forward.w2",
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"],
        **_GROUPED,
    ),
    "modernbert": _family(
        "layers.{}.mlp.Wo",
        kind="masked",
        square=_SQ,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        global_attn_every_n_layers=2,
        local_attention=4,
        **_BASIC,
    ),
    "distilbert": _family(
        "transformer.layer.{}.ffn.lin2",
        kind="masked",
        square=dict(hidden_dim=D),
        dim=D,
        hidden_dim=HIDDEN,
        n_layers=LAYERS,
        n_heads=2,
        max_position_embeddings=CONTEXT,
    ),
    "electra": _family(_BERT, kind="masked", square=_SQ, embedding_size=D, **_BASIC),
    "deberta-v2": _family(
        _BERT, kind="masked", square=_SQ, relative_attention=True, pos_att_type=["c2p", "p2c"], **_BASIC
    ),
}
FAMILIES = {**NAMED, **FURTHER}
# Layouts that none of those has: an MLP without a module of its own, one in a Sequential, post-norm decoders,
# recurrent blocks with an MLP. Examined in test_matrix.py alone.
MORE = {
    "openai-gpt": _family("h.{}.mlp.c_proj", 4 * D, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=CONTEXT),
    "ctrl": _family("h.{}.ffn.2", n_embd=D, dff=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=CONTEXT),
    "biogpt": _family("layers.{}.fc2", square=_SQ, pad_token_id=0, **_BASIC),
    "xglm": _family(
        "layers.{}.fc2",
        square=dict(ffn_dim=D),
        d_model=D,
        ffn_dim=HIDDEN,
        num_layers=LAYERS,
        attention_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    ),
    "glm": _family(_LLAMA, square=_SQ, pad_token_id=0, **_WIDE),
    "olmo": _family(_LLAMA, square=_SQ, **_GROUPED),
    "cohere2": _family(_LLAMA, square=_SQ, **_SLIDING),
    "nanochat": _family("layers.{}.mlp.fc2", square=_SQ, **_GROUPED),
    "seed_oss": _family(_LLAMA, square=_SQ, pad_token_id=0, **_WIDE),
    "recurrent_gemma": _family(
        "layers.{}.mlp_block.down_proj",
        HIDDEN // 2,
        lru_width=D,
        attention_window_size=4,
        block_types=["recurrent", "recurrent", "attention"],
        **_WIDE,
    ),
    "rwkv": _family(
        "blocks.{}.feed_forward.value",
        square=_SQ,
        hidden_size=D,
        attention_hidden_size=D,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        context_length=CONTEXT,
    ),
    "mpnet": _family(_BERT, kind="masked", square=_SQ, pad_token_id=0, **_BASIC),
    "deberta": _family(
        _BERT, kind="masked", square=_SQ, relative_attention=True, pos_att_type=["c2p", "p2c"], **_BASIC
    ),
    "xlm-roberta": _family(_BERT, kind="masked", square=_SQ, pad_token_id=0, **_BASIC),
    "eurobert": _family(_LLAMA, kind="masked", square=_SQ, pad_token_id=0, mask_token_id=1, **_GROUPED),
}
KNOWN = {**FAMILIES, **MORE}
CAUSAL = [name for name, f in FAMILIES.items() if f.kind == "causal"]
# One of each build: Conv1D, residual inside the MLP, fused gate, sliding window, parallel block, post-norm encoder.
VARIED = ["gpt2", "bloom", "phi3", "gemma3_text", "gptj", "bert"]

# Architectures without one MLP per layer: refused by name.
REFUSED = {
    "mixtral": dict(_GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "qwen2_moe": dict(
        _GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "qwen3_moe": dict(_WIDE, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
    "gpt_oss": dict(_WIDE, num_local_experts=2, num_experts_per_tok=1),
    "olmoe": dict(_GROUPED, num_experts=2, num_experts_per_tok=1),
    "albert": dict(_BASIC, embedding_size=D),
    "t5": dict(d_model=D, d_ff=HIDDEN, num_layers=LAYERS, num_heads=2, d_kv=8),
    "bart": dict(
        d_model=D,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    ),
    "mamba": dict(hidden_size=D, num_hidden_layers=LAYERS, state_size=4),
    "doge": dict(
        _GROUPED, is_moe=True, num_experts=4, num_experts_per_tok=2
    ),  # experts beside a dense MLP, in embeddings
    "mobilebert": dict(
        _BASIC, embedding_size=D, true_hidden_size=HIDDEN, intra_bottleneck_size=HIDDEN
    ),  # several MLPs to a block, and bottlenecks that look like one
    "xlnet": dict(d_model=D, n_layer=LAYERS, n_head=2, d_inner=HIDDEN),  # positions before texts
    "convbert": dict(_BASIC, embedding_size=D),  # padding reaches real tokens, as in the next three
    "fnet": dict(_BASIC, pad_token_id=0),
    "nystromformer": dict(_BASIC, pad_token_id=0),
    "yoso": dict(_BASIC, pad_token_id=0),
    "big_bird": dict(
        _BASIC, block_size=2, num_random_blocks=1, pad_token_id=0, sep_token_id=3
    ),  # a short batch changes its attention
    "xlm": dict(
        emb_dim=D, n_layers=LAYERS, n_heads=2, max_position_embeddings=CONTEXT, n_words=VOCAB
    ),  # the parts of a block in lists of their own
}

# Output projection of the attention, from the block on. What is not here has no heads in every layer, and is refused.
_FOLDING = {
    "self_attn.o_proj": """llama mistral qwen2 qwen3 gemma3_text phi3 gemma gemma2 stablelm starcoder2 cohere olmo2 glm4
        smollm3 granite nemotron exaone4 apertus glm olmo cohere2 nanochat seed_oss eurobert mixtral qwen2_moe
        qwen3_moe gpt_oss olmoe doge""",
    "self_attn.out_proj": "opt biogpt xglm",
    "self_attn.dense": "phi persimmon",
    "self_attention.dense": "bloom falcon",
    "attention.dense": "gpt_neox",
    "attn.c_proj": "gpt2 gpt_bigcode openai-gpt",
    "attn.out_proj": "gptj codegen mpt",
    "attn.attention.out_proj": "gpt_neo",
    "attn.Wo": "modernbert",
    "attention.output.dense": "bert roberta electra deberta-v2 deberta xlm-roberta",
    "attention.out_lin": "distilbert",
    "attention.attn.o": "mpnet",
    "multi_head_attention.dense": "ctrl",
}
ATTENTION = {name: path for path, names in _FOLDING.items() for name in names.split()}
SITES = ("mlp_out", "mlp_hidden", "attn_heads", "attn_out", "residual")

_BUILT: dict = {}


def config_of(name: str, **changes):
    "The tiny configuration of a family."
    from transformers import AutoConfig

    arguments = KNOWN[name].config if name in KNOWN else {"vocab_size": VOCAB, **REFUSED[name]}
    return AutoConfig.for_model(name, **{"bos_token_id": 2, "eos_token_id": 3, **arguments, **changes})


def shake(model, seed: int = 0):
    "Random numbers of order one everywhere: fresh models have zero biases and unit norms, which hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.3 * noise if p.dim() > 1 else p + 0.2 * noise)
    return model.eval()


def build(name: str, head: str | None = None, **changes):
    "A fresh random model: head 'causal', 'masked', 'base', 'classification'; None: what the family is made for."
    import transformers

    head = head or (KNOWN[name].kind if name in KNOWN else "base")
    auto = {
        "causal": "AutoModelForCausalLM",
        "masked": "AutoModelForMaskedLM",
        "base": "AutoModel",
        "classification": "AutoModelForSequenceClassification",
    }[head]
    if head == "classification":
        changes = {"num_labels": 3, "pad_token_id": 0, **changes}
    key = (name, head, repr(sorted(changes.items())))
    if key not in _BUILT:
        _BUILT[key] = shake(getattr(transformers, auto).from_config(config_of(name, **changes)))
    return copy.deepcopy(_BUILT[key])  # a test may do to its model what it likes


def sites_of(name: str) -> tuple[str, ...]:
    "The sites that a family has."
    return tuple(s for s in SITES if not s.startswith("attn") or name in ATTENTION)


def width_of(name: str, site: str) -> int:
    "Units of each layer."
    return KNOWN[name].hidden if site == "mlp_hidden" else D


def modules_of(name: str, model, site: str = "mlp_hidden") -> list[tuple[str, torch.nn.Module]]:
    "Name and module of every layer's entry, by the tables."
    modules = dict(model.named_modules())
    found = []
    down = KNOWN[name].down
    block = down[: down.index("{}") + 2]
    pattern = {"residual": block, "attn": f"{block}.{ATTENTION.get(name)}"}.get(site.partition("_")[0], down)
    for layer in range(LAYERS):
        ending = pattern.format(layer)
        (path,) = [p for p in modules if f".{p}".endswith(f".{ending}")]
        found.append((path, modules[path]))
    return found


def down_projections(name: str, model) -> list[tuple[str, torch.nn.Module]]:
    "Name and module of every layer's down projection, by the table."
    return modules_of(name, model)


def tokenizer(pad: bool = True, side: str = "right", special: bool = False, **options):
    """A word-level tokenizer of the words w4 ... w47, built offline; special=True puts <s> before and </s> after each
    text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "<s>": 2, "</s>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    t = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        t.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    names = dict(unk_token="[UNK]", bos_token="<s>", eos_token="</s>", **({"pad_token": "[PAD]"} if pad else {}))
    return PreTrainedTokenizerFast(tokenizer_object=t, padding_side=side, **names, **options)


def words(n: int, seed: int = 0) -> str:
    "A text of n random words."
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(4, VOCAB, (n,), generator=generator).tolist())


def state(model) -> list[tuple]:
    "Everything a well-behaved function gives back: modes, numbers of hooks, devices, dtypes."
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    )
    modules = [(n, m.training, *(len(getattr(m, h)) for h in hooks)) for n, m in model.named_modules()]
    return modules + [(n, p.device, p.dtype, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
