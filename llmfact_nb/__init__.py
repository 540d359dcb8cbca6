"""Functional networks in language models: find them by ICA, turn them into neuron masks, ablate, keep or amplify those neurons.

Every public name can be imported from here; its module is loaded when the name is first used, so that `import llmfact_nb` alone is instant and imports no torch."""

__version__ = "0.1.0"

_NAMES = {
    "resources": "load_model load_texts load_labelled load_cloze fetch",
    "sites": "NeuronSite NeuronSites neuron_sites",
    "activations": "Activations capture",
    "ica": "ICA",
    "masks": "NeuronMask apply_mask_and_average apply_mask_any",
    "group": "GroupICA dual_regression text_shards",
    "networks": "FunctionalNetworks iou match_networks",
    "reproducibility": "split_half suggest_k match_maps",
    "masked_model": "MaskedModel",
    "connectivity": "network_time_courses functional_connectivity",
    "evaluate": "EvalSet perplexity paired_difference label_accuracy cloze_accuracy",
    "accuracy": "paired_accuracy",
    "answers": "qa_scores",
    "generation": "generate_texts generation_samples generation_summary",
    "questions": "question_accuracy capital_questions",
    "head": "fit_classifier classifier_accuracy",
    "harness": "evaluate_with_lm_eval",
    "experiments": "ablation_study key_arms Settings PRESETS",
    "interventions": "Intervention injected_norm",
    "lesion": "Lesion",
    "published": "late_binding_evidence",
    "selections": "Candidates find_candidates",
    "studies": "damage_curve preservation_study amplification_study network_study lesion_study cross_task_study union_study",
    "recurrence": "recurrence_study",
    "verdicts": "verdict_table",
    "finetune": "NeuronTuningConfig get_neuron_model merge_and_unload neuron_training neuron_parameters",
    "schedules": "NetworkUnfreezeCallback NetworkActivateCallback FrozenGuardCallback",
    "sharing": "save_neurons load_neurons to_peft_lora",
    "gates": "NeuronGate",
    "pruning": "prune pruned_training save_pruned load_pruned",
    "tuning_study": "read_tuning",
    "masked_text": "side_by_side",
    "run": "run_settings read_run",
    "network_cards": "network_card",
    "whole_study": "read_study",
    "paper_figures": "draw_paper paper_table",
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
