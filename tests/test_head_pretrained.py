"""Heads of HuggingFace models equal what the models compute: logits, the loss, and gradients of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_problems import device_of
from torch import Tensor, nn

import fastkd
from fastkd import Head

V, H = 61, 16
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What the config says, far from what does nothing: name -> (settings, scale, softcap).
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "Llama": ({"tie_word_embeddings": False}, 1.0, None),
    "Gemma2": ({"final_logit_softcapping": 0.05, "sliding_window": 8}, 1.0, 0.05),
    "Cohere": ({"logit_scale": 3.0}, 3.0, None),
    "Granite": ({"logits_scaling": 0.25, "tie_word_embeddings": True}, 4.0, None),
}


def model_of(family: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def objective(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """T = 2, alpha = 0.5, rows of label -100 dropped; in plain torch."""
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    log_q, log_p = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1)
    soft = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    counts = labels.flatten() != -100
    return 0.5 * F.cross_entropy(student, labels.flatten()) + 0.5 * soft[counts].mean()


@pytest.mark.few_interpreted(3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_unfused_objective(impl: str, family: str, tied: bool) -> None:
    """Gradients of all parameters of the student, among them an embedding that is its head too."""
    settings, scale, softcap = FAMILIES[family]
    device = device_of(impl)
    student = model_of(family, **settings | {"tie_word_embeddings": tied}).to(device)
    teacher = model_of("Llama", hidden_size=24, head_dim=12).to(device).eval()
    ids = torch.randint(3, V, (2, 5), device=device)
    labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        taught = teacher.model(ids).last_hidden_state

    head = Head.from_model(student, student.model(ids).last_hidden_state, workspace=3 * 2 * V * 4)
    assert (head.scale, head.softcap, head.workspace) == (scale, softcap, 3 * 2 * V * 4)
    assert head.weight is student.lm_head.weight
    assert (head.weight is student.get_input_embeddings().weight) == tied
    loss = fastkd.kd_loss(head, Head.from_model(teacher, taught), labels, temperature=2.0, impl=impl)
    loss.backward()
    got = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    want = objective(student(ids).logits, teacher(ids).logits.detach(), labels)
    want.backward()
    close(loss.detach(), want.detach())
    for name, p in student.named_parameters():
        close(got[name], p.grad)
        assert float(p.grad.abs().max()) > 1e-6, name
    assert all(p.grad is None for p in teacher.parameters())


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a factor": ("FalconH1", {"lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}),
    "hidden states that are divided": ("MiniCPM3", {"dim_model_base": 4}),
    "scaled the other way round": ("HyperCLOVAX", {"logits_scaling": 3.0}),
    "another name of a softcap": ("NanoChat", {"final_logit_softcapping": 0.05}),
    "a bias": ("Phi", {}),
    "nothing": ("Qwen2", {}),
}


@pytest.mark.parametrize("what", OTHERS)
@torch.no_grad()
def test_other_families(what: str) -> None:
    family, settings = OTHERS[what]
    model = model_of(family, **{**settings} | ({"head_dim": None} if family == "MiniCPM3" else {})).eval()
    for p in model.lm_head.parameters():
        p.normal_()
    ids = torch.randint(3, V, (1, 5))
    close(Head.from_model(model, model.model(ids).last_hidden_state).logits(), model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["T5", "UMT5", "Bart"])
def test_encoder_decoders(family: str) -> None:
    """T5 multiplies hidden states before its tied head; Bart adds a bias after its."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": V, "d_model": H, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    if family == "Bart":
        sizes = {"vocab_size": V, "d_model": H, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**sizes, **tokens)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    if family == "Bart":
        model.final_logits_bias.normal_()
    ids = torch.randint(3, V, (1, 5))
    output = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    close(Head.from_model(model, output.decoder_hidden_states[-1]).logits(), output.logits)


class LoraLinear(nn.Module):
    """Has the shape of peft's layer of that kind, and its forward."""

    def __init__(self, base: nn.Linear, ranks: dict[str, int], dropout: float, bias: bool) -> None:
        super().__init__()
        self.base_layer = base
        sizes = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({name: nn.Linear(sizes[0], r, bias=False) for name, r in ranks.items()})
        self.lora_B = nn.ModuleDict({name: nn.Linear(r, sizes[1], bias=bias) for name, r in ranks.items()})
        self.lora_dropout = nn.ModuleDict({name: nn.Dropout(dropout) for name in ranks})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling = {name: 0.5 + k for k, name in enumerate(ranks)}
        self.active_adapters, self.use_dora = list(ranks), dict.fromkeys(ranks, False)
        self.merged = self.disable_adapters = False
        self.lora_variant: dict[str, Any] = {}

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        if self.merged or self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                first = self.lora_A[name](self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype)))
                result = result + self.lora_B[name](first) * self.scaling[name]
        return result


def with_lora(dropout: float = 0.0, bias: bool = False, **ranks: int) -> Any:
    model = model_of("Gemma2", final_logit_softcapping=5.0, sliding_window=8)
    model.lm_head = LoraLinear(model.lm_head, ranks or {"default": 4}, dropout, bias)
    return model


@pytest.mark.few_interpreted(2)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("dropout", "bias", "ranks"),
    [(0.0, False, {"default": 4}), (0.0, True, {"one": 4, "two": 3}), (0.5, False, {"default": 4})],
    ids=["plain", "two adapters with biases", "dropout"],
)
def test_lora(impl: str, dropout: float, bias: bool, ranks: dict[str, int], frozen: bool) -> None:
    """As trained: all parameters, or the adapter's alone; under dropout both draw the same mask."""
    device = device_of(impl)
    model = with_lora(dropout, bias, **ranks).to(device)
    if frozen:
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
    ids, teacher = torch.randint(3, V, (1, 4), device=device), torch.randn(1, 4, V, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]

    torch.manual_seed(1)
    head = Head.from_model(model, model.model(ids).last_hidden_state)
    got = fastkd.kd_loss(head, teacher, impl=impl)
    torch.manual_seed(1)
    want = fastkd.kd_loss(model(ids).logits, teacher, impl=impl)
    close(got.detach(), want.detach())
    for a, b in zip(torch.autograd.grad(got, trained), torch.autograd.grad(want, trained), strict=True):
        close(a, b)
        assert float(b.abs().max()) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("state", ["merged", "disable_adapters", "inactive"])
def test_lora_that_does_nothing(state: str) -> None:
    model = with_lora().eval()
    if state == "inactive":
        model.lm_head.active_adapters = ["of another layer"]
    else:
        setattr(model.lm_head, state, True)
    ids = torch.randint(3, V, (1, 4))
    head = Head.from_model(model, model.model(ids).last_hidden_state)
    assert torch.equal(head.weight, model.lm_head.base_layer.weight)
    close(head.logits(), model(ids).logits)


def test_lora_of_another_precision() -> None:
    """peft keeps adapters in float32 beside a bfloat16 weight."""
    model = with_lora()
    model.lm_head.base_layer.bfloat16()
    hidden = torch.randn(3, H).bfloat16()
    layer = model.lm_head
    delta = layer.lora_B["default"](layer.lora_A["default"](hidden.float())) * layer.scaling["default"]
    want = 5 * torch.tanh((hidden.float() @ layer.weight.float().t() + delta) / 5)
    close(Head.from_model(model, hidden).logits(), want)


def test_a_layer_that_is_trained_whole_beside_adapters() -> None:
    """peft's modules_to_save: a copy of the layer for each adapter."""
    model = model_of("Llama")
    layer = nn.Module()
    layer.original_module = model.lm_head
    layer.modules_to_save = nn.ModuleDict({"default": nn.Linear(H, V, bias=False)})
    layer.active_adapters, layer.disable_adapters = ["default"], False
    model.lm_head = layer
    assert Head.from_model(model, torch.zeros(2, H)).weight is layer.modules_to_save["default"].weight
    layer.disable_adapters = True
    assert Head.from_model(model, torch.zeros(2, H)).weight is layer.original_module.weight


def test_wrapped_models() -> None:
    model = model_of("Granite", logits_scaling=4.0)
    wrapped = nn.Module()
    wrapped.module = model
    head = Head.from_model(wrapped, torch.zeros(2, H))
    assert (head.weight is model.lm_head.weight, head.scale) == (True, 0.25)


def test_options_and_numbers_of_ones_own() -> None:
    """Where scale or softcap is passed, the config is not asked."""
    model = model_of("Gemma2", final_logit_softcapping=30.0)
    head = Head.from_model(model, torch.zeros(2, H), compact=False, grad_precision="float32")
    assert (head.softcap, head.compact, head.grad_precision) == (30.0, False, "float32")
    assert Head.from_model(model, torch.zeros(2, H), scale=2.0).softcap is None
    model.config.logits_divided_by = 3.0
    assert Head.from_model(model, torch.zeros(2, H), softcap=20.0).softcap == 20.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'softcapping'"):
        Head.from_model(model, torch.zeros(2, H), scale=1.0, softcapping=20.0)


def stand_in(layer: Any = None, text: dict[str, Any] | None = None, **config: Any) -> Any:
    """``text``: the config of the part that makes the logits, if it is not the whole."""
    model = nn.Module()
    model.lm_head = nn.Linear(H, V) if layer is None else layer
    model.get_output_embeddings = lambda: model.lm_head
    model.config = SimpleNamespace(**{"model_type": "llama", **config})
    if text is not None:
        model.config.get_text_config = lambda decoder: SimpleNamespace(**text)
    return model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"logits_scaling": 8.0}, "be known to honour logits_scaling, .* got logits_scaling=8.0 of a llama"),
        ({"logit_scale": 0.5}, "be known to honour logit_scale"),
        ({"final_logit_softcapping": 1.0}, "be known to honour final_logit_softcapping"),
        ({"output_multiplier_scale": 0.2}, "be known to honour output_multiplier_scale"),
        ({"mup_width_multiplier": 8.0}, "be known to honour mup_width_multiplier"),
        ({"mup_width_scale": 0.5}, "be known to honour mup_width_scale"),
        ({"use_mup": True}, "be known to honour use_mup"),
        ({"dim_model_base": 256}, "be known to honour dim_model_base"),
        ({"lm_head_multiplier": 2}, "be known to honour lm_head_multiplier"),
        ({"logits_softcap": 30.0}, "be known to honour logits_softcap"),
        ({"unpadded_vocab_size": V - 1}, "be known to honour unpadded_vocab_size"),
        ({"model_type": "llava", "text": {"logit_scale": 0.1}}, "got logit_scale=0.1 of a llava"),
        ({"model_type": "chameleon"}, "got chameleon, which masks the ids of images"),
        ({"model_type": "gemma2", "final_logit_softcapping": 0.0}, "Head: softcap must be positive"),
    ],
    ids=str,
)
def test_configs_that_ask_for_more_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Head.from_model(stand_in(**config), torch.zeros(2, H))


@pytest.mark.parametrize(
    "config",
    [
        {"logits_scaling": 1.0, "logit_scale": None, "final_logit_softcapping": None, "use_mup": False},
        {"output_router_logits": True, "attn_logit_softcapping": 50.0, "router_logits_scale": 2.0},
        {"num_logits_to_keep": 4, "lm_head_bias": True, "unpadded_vocab_size": V, "embedding_multiplier": 12.0},
        {"model_type": "aya_vision", "text": {"logit_scale": 0.1}},
    ],
    ids=str,
)
def test_configs_that_ask_for_nothing(config: dict[str, Any]) -> None:
    head = Head.from_model(stand_in(**config), torch.zeros(2, H))
    assert (head.scale, head.softcap) == (1.0, None)


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight))


class Predictions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform, self.decoder = nn.Linear(H, H), nn.Linear(H, V)


def nested() -> Any:
    model = stand_in(Predictions())
    model.get_output_embeddings = lambda: model.lm_head.decoder
    return model


def broken(change: Callable[[Any], Any]) -> Any:
    layer = LoraLinear(nn.Linear(H, V), {"default": 2}, 0.0, False)
    change(layer)
    return stand_in(layer)


def no_config() -> Any:
    model = stand_in()
    del model.config
    return model


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: nn.Linear(H, V), TypeError, r"model must have get_output_embeddings\(\), .* got Linear"),
        (no_config, TypeError, "model must have a config with a model_type"),
        (lambda: stand_in(nn.ModuleList([nn.Linear(H, V)])), TypeError, "have a linear layer, .* got ModuleList"),
        (lambda: stand_in(Normalised(H, V)), TypeError, "have a linear layer, .* got Normalised"),
        (nested, ValueError, "by its output layer alone .* got a Predictions with other layers"),
        (
            lambda: broken(lambda x: x.use_dora.update(default=True)),
            ValueError,
            "have plain LoRA .* a variant in",
        ),
        (lambda: broken(lambda x: x.lora_variant.update(default=1)), ValueError, "have plain LoRA"),
        (lambda: broken(lambda x: x.lora_A.update({"default": Normalised(H, 2)})), TypeError, "have linear layers in"),
        (lambda: broken(lambda x: delattr(x, "lora_A")), TypeError, "have LoRA as the adapter .* got LoraLinear"),
        (lambda: broken(lambda x: vars(x).update(merged=True, disable_adapters=True)), ValueError, "unmerged before"),
    ],
)
def test_models_that_are_refused(model: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Head.from_model: .*{message}"):
        Head.from_model(model(), torch.zeros(2, H))


def test_hidden_states_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="Head: input must have the weight's hidden size, 16, last"):
        Head.from_model(stand_in(), torch.zeros(2, H + 1))
    with pytest.raises(TypeError, match="Head: input must be a tensor, got tuple"):
        Head.from_model(stand_in(), (torch.zeros(2, H),))  # type: ignore[arg-type]
