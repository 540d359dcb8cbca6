"""Functional networks in language models: find them by ICA, turn them into neuron masks, ablate, keep or amplify those neurons.

Every public name can be imported from here; its module is loaded when the name is first used, so that `import llmfact_nb` alone is instant and imports no torch."""

__version__ = "0.1.0"

_NAMES = {
    "base.resources": "load_model load_texts load_labelled load_cloze fetch",
    "sites": "NeuronSite NeuronSites neuron_sites",
    "activations": "Activations capture",
    "ica": "ICA",
    "masks": "NeuronMask apply_mask_and_average apply_mask_any",
    "across.group": "GroupICA dual_regression text_shards",
    "networks": "FunctionalNetworks iou match_networks",
    "across.reproducibility": "split_half suggest_k match_maps",
    "masked_model": "MaskedModel",
    "connectivity": "network_time_courses functional_connectivity",
    "evaluate": "EvalSet perplexity paired_difference label_accuracy cloze_accuracy",
    "scores.accuracy": "paired_accuracy",
    "scores.answers": "qa_scores",
    "scores.generation": "generate_texts generation_samples generation_summary",
    "scores.questions": "question_accuracy capital_questions",
    "scores.head": "fit_classifier classifier_accuracy",
    "scores.harness": "evaluate_with_lm_eval",
    "ablation": "ablation_study key_arms Settings PRESETS",
    "study.interventions": "Intervention injected_norm",
    "study.subtraction": "Lesion",
    "paper": "late_binding_evidence",
    "study.selections": "Candidates find_candidates",
    "study.studies": "damage_curve preservation_study amplification_study network_study lesion_study cross_task_study union_study",
    "across.recurrence": "recurrence_study",
    "study.verdicts": "verdict_table",
    "finetune": "NeuronTuningConfig get_neuron_model merge_and_unload neuron_training neuron_parameters",
    "tuning.schedules": "NetworkUnfreezeCallback NetworkActivateCallback FrozenGuardCallback",
    "tuning.sharing": "save_neurons load_neurons to_peft_lora",
    "tuning.gates": "NeuronGate",
    "tuning.pruning": "prune pruned_training save_pruned load_pruned",
    "tuning.comparison": "read_tuning",
    "command.masked_text": "side_by_side",
    "command.run": "run_settings read_run",
    "show.network_cards": "network_card",
    "study.whole": "read_study",
    "show.paper_figures": "draw_paper paper_table",
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
