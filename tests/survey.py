"""A look at every causal and masked language model that transformers knows by name: built without weights from a small
configuration that is guessed from its own, and asked where its neurons are.

Coarser than families.py, which builds what it knows; but it meets the models that nobody thought of."""

import warnings

import torch

from llmfact_nb.sites import neuron_sites

D, LAYERS = 16, 3
NOT_BUILT = "not built"


def kinds() -> dict[str, str]:
    "Model type -> name of the automatic class that makes it."
    from transformers.models.auto import modeling_auto as auto

    masked = dict.fromkeys(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "AutoModelForMaskedLM")
    return dict(
        sorted((masked | dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM")).items())
    )


def small(model_type: str, hidden: int):
    "The type's configuration with three narrow layers, MLPs of `hidden` units, two experts where there are experts."
    from transformers import AutoConfig

    widths = dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), D)
    widths |= dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "hidden_dim",
            "d_ff",
            "dff",
            "dim_ff",
            "ffn_hidden_size",
            "decoder_ffn_dim",
        ),
        hidden,
    )
    counts = dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS
    ) | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2)
    wanted = (
        widths
        | counts
        | dict(
            vocab_size=48,
            num_key_value_heads=1,
            max_position_embeddings=64,
            n_positions=64,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    usual = AutoConfig.for_model(model_type)
    own, aliases = usual.to_dict(), getattr(usual, "attribute_map", {})
    chosen = {k: v for k, v in wanted.items() if k in own or k in aliases and aliases[k] not in wanted}
    for k, v in own.items():
        if "expert" in k and isinstance(v, int) and v > 4:
            chosen[k] = 2
        elif isinstance(v, list) and len(v) == own.get("num_hidden_layers"):
            chosen[k] = None if k == "layer_types" else v[:LAYERS]
    return AutoConfig.for_model(model_type, **chosen)


def look(model_type: str, hidden: int = 24) -> str | tuple[tuple[str, int], ...]:
    "Name and width of each neuron site; or the words of a refusal; or that no small model could be built."
    import transformers

    auto = getattr(transformers, kinds()[model_type])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = auto.from_config(small(model_type, hidden))
        except Exception:  # the guess does not suit it, in whatever way: such types are counted
            return NOT_BUILT
    try:
        return tuple((s.name, s.width) for s in neuron_sites(model, "mlp_hidden"))
    except NotImplementedError as e:
        return str(e)
