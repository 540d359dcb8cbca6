"""Functional networks in language models: find them by ICA, turn them into neuron masks, ablate, keep or amplify those
neurons.

What most users need can be imported from here, all else from its module. A module is loaded when one of its names is
first used, so that `import llmfact_nb` alone is instant and imports no torch."""

__version__ = "0.1.0"

_NAMES = {
    "base.models": "load_model",
    "base.texts": "load_texts load_labelled",
    "sites": "neuron_sites",
    "activations": "Activations capture",
    "ica": "ICA",
    "masks": "NeuronMask apply_mask_and_average apply_mask_any",
    "across.group": "GroupICA",
    "networks": "FunctionalNetworks iou match_networks",
    "across.reproducibility": "split_half match_maps",
    "across.untrained": "untrained",
    "across.fingerprint": "fingerprint",
    "masked_model": "MaskedModel",
    "connectivity": "network_time_courses functional_connectivity",
    "evaluate": "EvalSet perplexity paired_difference label_accuracy cloze_accuracy paired_accuracy",
    "scores.generation": "generate_texts",
    "scores.head": "fit_classifier classifier_accuracy",
    "scores.contrast": "contrast_set localize",
    "ablation": "Settings find_networks Intervention loss_on answers_on ScoreCache measure ablation_study",
    "study.studies": "damage_curve preservation_study amplification_study",
    "across.recurrence": "recurrence_study",
    "finetune": "NeuronTuningConfig get_neuron_model merge_and_unload neuron_training",
    "tuning.schedules": "NetworkUnfreezeCallback NetworkActivateCallback FrozenGuardCallback",
    "tuning.sharing": "save_neurons load_neurons to_peft_lora",
    "tuning.gates": "NeuronGate",
    "tuning.pruning": "prune save_pruned load_pruned",
    "command.run": "read_run",
    "study.whole": "paper_study read_study",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name):
    import importlib

    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # the next access does not come here
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
