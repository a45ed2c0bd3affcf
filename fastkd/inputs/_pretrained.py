"""The head of a HuggingFace model: its output layer, and what its forward does with the logits after that.

A model is known by ``get_output_embeddings()`` and by its config, and a LoRA layer by its attributes: neither
transformers nor peft is imported. A model's config may ask for something between hidden states and logits that another
family ignores, or does the other way round (Granite divides by ``logits_scaling``, HyperCLOVA X multiplies). So what is
not known is refused: a student would silently be trained on another objective.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import _checks
from ..int8.configs import WeightOnly
from ..int8.embedding import Int8Embedding
from ..int8.layer import Int8Layer
from ..int8.linear import Int8Linear

OP = "Head.from_model"
ELSE = "build Head(hidden, weight, bias) yourself"

# What a name in the config means for the logits, by the model_type of the whole model: one of text and images may
# ignore what the config of its text part says.
MEANING: dict[str, dict[str, tuple[str, ...]]] = {
    "logit_scale": {
        "times": ("cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text"),
        "ignored": ("mpt", "aya_vision", "cohere2_vision"),
    },
    "logits_scaling": {
        "over": (
            *("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
            *("granite4_vision", "granite_docling", "minicpm3"),
        ),
        "times": ("hyperclovax", "hyperclovax_vision_v2"),
        "ignored": ("granite_speech", "granite_speech_plus"),
    },
    "lm_head_multiplier": {"times": ("falcon_h1",)},
    "output_multiplier": {"times": ("muse_glimmer", "muse_spark")},
    "logits_mup_width_multiplier": {"over": ("inkling_mm_model", "inkling_text")},
    "final_logit_softcapping": {
        "cap": (
            *("gemma2", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"),
            *("gemma4_unified_text", "diffusion_gemma", "paligemma", "t5gemma", "t5gemma2", "vaultgemma"),
            *("beam", "inkling2", "inkling2_text", "mistral_large4", "muse_glimmer", "muse_spark", "nanochat"),
        ),
        "ignored": ("gemma3",),
    },
    "logits_soft_cap": {"cap": ("recurrent_gemma",)},
    "output_logit_soft_cap": {"cap": ("xlstm",)},
    "scale_decoder_outputs": {"t5": ("t5", "longt5", "pop2piano")},
    "tie_word_embeddings": {"t5": ("umt5", "switch_transformers", "udop")},
    "dim_model_base": {"ignored": ("minicpm3",)},  # it is in logits_scaling
    "mup_enabled": {"ignored": ("afmoe",)},  # of the embeddings
}
# Names that may well be about the logits, but for those that are about something else.
SUSPECT = re.compile(
    r"logit|soft_?cap|mup|lm_head|dim_model_base|unpadded_vocab|(output|head|width)_(scale|scaling|multiplier)"
)
UNRELATED = re.compile(
    r".*attn|.*attention|.*router|moe_|mlp_|gate_|contrastive_|lsd_|mup_vector|logit_scale_init|max_logit_scale|"
    r"lm_head_bias$|freeze_lm_head$|chunk_size_lm_head$|num_logits_to_keep$|logits_to_keep$|output_logits$|"
    r"renormalize_logits$|output_auxiliary_logits$|average_logits_per_cell$"
)
# Forwards that do more than an output layer, though no config says so.
REFUSED = {
    "chameleon": "masks the ids of images",
    "clvp": "normalises before its output layer",
    "clvp_decoder": "normalises before its output layer",
    "dia": "has several outputs a token",
    "electra": "has other layers before its output layer",
    "gemma4_assistant": "computes some of its logits",
    "gemma4_unified_assistant": "computes some of its logits",
    "modernbert-decoder": "has other layers before its output layer",
    "prophetnet": "has several outputs a token",
}


def unwrap(model: Any) -> Any:
    """Out of DistributedDataParallel and the like."""
    while not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not callable(getattr(model, "get_output_embeddings", None)):
        _checks.bad_type(OP, "model", "have get_output_embeddings(), as HuggingFace's do", type(model).__name__)
    return model


def tensors(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias of the output layer of an unwrapped model."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Module):
        _checks.bad_type(OP, "model", f"have an output layer ({ELSE})", type(layer).__name__)
    _check_place(model, layer)
    hidden, weight, bias = of_layer(layer, hidden)
    extra = getattr(model, "final_logits_bias", None)  # Bart's, Marian's
    if isinstance(extra, Tensor):
        extra = extra.reshape(-1)
        bias = extra if bias is None else bias + extra
    return hidden, weight, bias


def scale_and_softcap(model: Any, vocabulary: int) -> tuple[float, float | None]:
    """What the config of an unwrapped model says."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        _checks.bad_type(OP, "model", f"have a config with a model_type, {or_pass()}", type(model).__name__)
    if kind in REFUSED:
        _refuse(f"turn hidden states into logits by its output layer alone ({ELSE})", f"{kind}, which {REFUSED[kind]}")
    scale, softcap = 1.0, None
    for name, value in _settings(config):
        meaning = next((what for what, kinds in MEANING.get(name, {}).items() if kind in kinds), None)
        if meaning is None and not _neutral(name, value, vocabulary):
            _refuse(f"be known to honour {name}, or to ignore it, {or_pass()}", f"{name}={value!r} of a {kind}")
        if meaning in (None, "ignored") or value is None:
            continue
        if meaning == "cap":
            softcap = value
        elif meaning == "t5":
            scale *= _decoder(config).d_model ** -0.5 if value else 1.0
        else:
            scale = scale * value if meaning == "times" else scale / value
    return scale, softcap


def or_pass() -> str:
    return "or scale and softcap have to be passed"


def _refuse(rule: str, got: str) -> NoReturn:
    _checks.bad_value(OP, "model", rule, got)


def _decoder(config: Any) -> Any:
    """The config of the part that makes the logits."""
    choose = getattr(config, "get_text_config", None)
    return config if choose is None else choose(decoder=True)


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """All that may be about logits, properties too; the part's own come before those of the whole."""
    seen: set[str] = set()
    for part in (_decoder(config), config):
        for name in dir(part):
            about_logits = name in MEANING or (SUSPECT.search(name) and not UNRELATED.match(name))
            if name.startswith("_") or name in seen or not about_logits:
                continue
            value = getattr(part, name, None)
            if not callable(value):
                seen.add(name)
                yield name, value


def _neutral(name: str, value: Any, vocabulary: int) -> bool:
    """Whether it asks for nothing."""
    if value is None or value is False or name in ("scale_decoder_outputs", "tie_word_embeddings"):
        return True
    if "unpadded_vocab" in name:
        return bool(value >= vocabulary)
    return "cap" not in name and value is not True and isinstance(value, (int, float)) and value == 1


def _check_place(model: Any, layer: nn.Module) -> None:
    """That hidden states go straight into the layer: it belongs to a model, or to a wrapper that has nothing else."""
    parents = [module for module in model.modules() if any(child is layer for child in module.children())]
    for parent in parents:
        if hasattr(parent, "get_output_embeddings"):
            continue
        own = {id(x) for x in _weights(layer)}
        if any(id(x) not in own for x in _weights(parent)):
            rule = f"turn hidden states into logits by its output layer alone ({ELSE})"
            _refuse(rule, f"a {type(parent).__name__} with other layers")
        _check_place(model, parent)


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *(x.weight for x in module.modules() if isinstance(x, Int8Layer))]


def of_layer(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if isinstance(getattr(layer, "modules_to_save", None), nn.ModuleDict):  # peft's, of layers that are trained whole
        return of_layer(_trained_whole(layer), hidden)
    if hasattr(layer, "base_layer"):
        return _with_lora(layer, hidden)
    # A subclass that computes something else is neither.
    kinds = (nn.Linear, nn.Embedding, Int8Linear, Int8Embedding)
    if not any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds):
        rule = f"have a linear layer, or one with LoRA, as its output layer ({ELSE})"
        _checks.bad_type(OP, "model", rule, type(layer).__name__)
    return hidden, layer.weight, getattr(layer, "bias", None)


def rounding(layer: Any) -> dict[str, Any]:
    """What a :class:`Head` has to know of an int8 layer beside its weight and bias."""
    while isinstance(getattr(layer, "modules_to_save", None), nn.ModuleDict):
        layer = _trained_whole(layer)
    if not isinstance(layer, (Int8Linear, Int8Embedding)):
        return {}
    return {"weight_scale": layer.scale, "round_input": not isinstance(layer.config, WeightOnly)}


def _trained_whole(layer: Any) -> Any:
    if getattr(layer, "disable_adapters", False):
        return layer.original_module
    active = [name for name in layer.active_adapters if name in layer.modules_to_save]
    if len(active) > 1:
        _refuse("have one active adapter of its output layer", repr(active))
    return layer.modules_to_save[active[0]] if active else layer.original_module


def _with_lora(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """``[hidden, scaling * A(dropout(hidden))] @ [weight, B].T``: as exact as the layer, and weight stays as it is."""
    if not all(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")):
        rule = f"have LoRA as the adapter of its output layer ({ELSE}, or merge the adapter)"
        _checks.bad_type(OP, "model", rule, type(layer).__name__)
    plain, weight, bias = of_layer(layer.base_layer, hidden)
    if not weight.is_floating_point():
        _checks.bad_type(OP, "model", "have a float layer under the LoRA of its output layer", weight.dtype)
    merged, disabled = getattr(layer, "merged", False), getattr(layer, "disable_adapters", False)
    if merged and disabled:
        _refuse("have its adapter unmerged before it is disabled", "merged weights")
    if merged or disabled:
        return plain, weight, bias
    inputs, weights = [plain], [weight]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            _refuse_embedding(layer, name)
            continue
        first, second, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        _check_adapter(layer, name, first, second)
        dropout = layer.lora_dropout[name] if name in getattr(layer, "lora_dropout", {}) else nn.Identity()
        inputs.append(first(dropout(hidden.to(first.weight.dtype))) * scaling)
        weights.append(second.weight)
        if second.bias is not None:
            bias = second.bias * scaling if bias is None else bias + second.bias * scaling
    return torch.cat(inputs, -1), torch.cat(weights, -1), bias


def _check_adapter(layer: Any, name: str, first: Any, second: Any) -> None:
    dora = getattr(layer, "use_dora", None)
    if (isinstance(dora, dict) and dora.get(name)) or name in getattr(layer, "lora_variant", {}):
        _refuse(f"have plain LoRA as the adapter of its output layer ({ELSE}, or merge it)", f"a variant in {name!r}")
    for one in (first, second):
        if not isinstance(one, nn.Linear) or type(one).forward is not nn.Linear.forward:
            _checks.bad_type(OP, "model", "have linear layers in the LoRA of its output layer", type(one).__name__)


def _refuse_embedding(layer: Any, name: str) -> None:
    if name in getattr(layer, "lora_embedding_A", {}):
        _refuse(f"have LoRA on its output layer itself ({ELSE}, or merge it)", f"an embedding's LoRA in {name!r}")
