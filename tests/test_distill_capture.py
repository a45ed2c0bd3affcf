"""What a path names, in every kind of model, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from distill_models import Net, Text, hooks, texts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastkd.distill import Capture


class Branches(nn.Module):
    """Outputs that are tuples and dicts, keyword arguments, a layer that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.shared = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = self.pair(x, scale=2.0)
        y = first[0]
        for _ in range(3):
            y = self.shared(y)
        return {"logits": y, "aux": [x, first[1]]}


class Pair(nn.Module):
    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        return x * scale, {"twice": 2 * x}


def test_paths() -> None:
    model, x = Branches(), torch.randn(2, 3)
    one, two, three = (chain(model.shared, 2 * x, n) for n in (1, 2, 3))
    want = {
        "": three,
        ":output[logits]": three,
        ":output[aux][0]": x,
        ":output[aux][-1][twice]": 2 * x,
        ":input": x,
        ":input[0]": x,
        "pair:output[0]": 2 * x,
        "pair:output[1][twice]": 2 * x,
        "pair:input": x,
        "pair:input[scale]": 2.0,
        "shared": three,
        "shared@0": one,
        "shared@1": two,
        "shared@1:input": one,
        "shared:input": two,
    }
    values = Capture(model, want)(x)
    assert list(values) == list(want)
    for path, value in want.items():
        torch.testing.assert_close(values[path], value, msg=path)
    assert hooks(model) == 0


def chain(layer: nn.Module, x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = layer(x)
    return x


def test_values_carry_gradients() -> None:
    model, x = Net(4, dropout=0.0), torch.randn(5, 8)
    Capture(model, ["body.0"])(x)["body.0"].sum().backward()
    assert model.body[0].weight.grad is not None
    assert model.head.weight.grad is None


def test_outputs_of_text_models() -> None:
    model, batch = Text(8, 2).eval(), texts()
    batch.pop("labels")
    values = Capture(model, ["", ":output[hidden_states][1]", "layers.0", "layers.1.self_attn:attention"])(**batch)
    output = model(**batch)
    torch.testing.assert_close(values[""], output.logits)
    assert torch.equal(values["layers.0"], values[":output[hidden_states][1]"])
    weights = values["layers.1.self_attn:attention"]
    assert weights.shape == (3, 2, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 7))
    assert (weights[0, :, :, -2:] == 0).all()  # padding


@pytest.mark.parametrize("positional", [False, True])
def test_attention_is_asked_for_and_its_caller_is_not_disturbed(positional: bool) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(1, 3, 4)
    later = torch.ones(3, 3, dtype=torch.bool).triu(1)
    arguments = (x, x, x, None, False, later) if positional else (x, x, x)
    named = {} if positional else {"need_weights": False, "attn_mask": later}
    values = Capture(attention, [":output[0]"])(*arguments, **named)
    inside = nn.ModuleDict({"attention": attention})
    capture = Capture(inside, ["attention:attention", "attention:output[0]"])
    got = capture.run(lambda: inside["attention"](*arguments, **named))
    torch.testing.assert_close(got["attention:output[0]"], values[":output[0]"])  # by another kernel
    assert got["attention:attention"].shape == (1, 2, 3, 3)
    assert torch.equal(got["attention:attention"] == 0, later.expand(1, 2, 3, 3))
    capture.attach()  # hooks that stay are idle between calls
    assert attention(*arguments, **named)[1] is None


def test_attention_that_nobody_computed() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    with pytest.raises(ValueError, match=r"'0:attention': the module returns no attention weights"):
        Capture(nn.Sequential(Bare()), ["0:attention"])(torch.ones(1))


ERRORS = {
    "bod": r"Capture: path must name a submodule of Net, such as 'body', .*, got 'bod'",
    "body.9": r"Capture: path must name a submodule of Net, such as 'body.*', got 'body.9'",
    "zzz": r"such as 'body', 'head', got 'zzz'",
    "body:out": r"Capture: path must read module, module@call, module:input, .*, got 'body:out'",
    "body@x": r"must read",
    "body[0]": r"must read",
    "body:attention[0]": r"have no item behind :attention",
}


@pytest.mark.parametrize("path", ERRORS)
def test_wrong_paths(path: str) -> None:
    with pytest.raises(ValueError, match=ERRORS[path]):
        Capture(Net(4), [path])


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="Capture: model must be a module, got int"):
        Capture(3, [])  # type: ignore[arg-type]
    copies = nn.DataParallel(Net(4))
    copies.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"model must run in one thread: .*, got DataParallel on 2 devices"):
        Capture(copies, ["body"])
    with pytest.raises(TypeError, match="Capture: paths must be a sequence of paths, got a string"):
        Capture(Net(4), "body")
    with pytest.raises(TypeError, match="Capture: path must be a string, got int"):
        Capture(Net(4), [3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("pair:output[2]", ValueError, r"'pair:output\[2\]': there is no item 2 in a tuple of 2"),
        ("pair:output[1][x]", ValueError, r"there is no item 'x' in dict of 'twice'"),
        ("pair:input[y]", ValueError, r"there is no item 'y' in dict of 'scale'"),
        ("unused", RuntimeError, r"Capture: 'unused' was not called in this forward$"),
        ("shared@3", RuntimeError, r"Capture: 'shared@3' was called 3 times only in this forward$"),
    ],
)
def test_what_only_a_call_shows(path: str, error: type[Exception], message: str) -> None:
    model = Branches()
    with pytest.raises(error, match=message):
        Capture(model, [path])(torch.randn(2, 3))
    assert hooks(model) == 0


def test_a_model_without_logits() -> None:
    with pytest.raises(ValueError, match=r"the model returns a tuple of 2, of which none is called logits"):
        Capture(Pair(), [""])(torch.ones(1), scale=1.0)


def test_hooks_are_gone_after_an_exception() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("no")

    model = nn.Sequential(nn.Linear(2, 2), Fails())
    model[0].register_forward_hook(lambda *_: None)
    capture = Capture(model, ["0", "0:input", "1"])
    with pytest.raises(OSError, match="no"):
        capture(torch.ones(1, 2))
    assert hooks(model) == 1
    model[1] = nn.Identity()
    assert capture(torch.ones(1, 2)).keys() == {"0", "0:input", "1"}


def test_nothing_is_kept() -> None:
    model = Net(4)
    capture = Capture(model, ["body.0", "body.0:input", ""])
    values = capture(torch.randn(3, 8))
    alive = [weakref.ref(value) for value in values.values()]
    del values
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_a_change_in_place_is_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match="'0' was changed in place after it was captured; set inplace=False"):
        Capture(model, ["0"])(torch.randn(1, 2))
    with pytest.raises(RuntimeError, match="'1:input' was changed in place"), torch.no_grad():
        Capture(model, ["1:input"])(torch.randn(1, 2))
    assert (Capture(model, ["1"])(torch.randn(1, 2))["1"] >= 0).all()
    with torch.inference_mode():
        Capture(model, ["1"])(torch.randn(1, 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Outside of what is computed twice both kinds work, inside of it the one that autograd sees."""

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(4, dropout=0.0)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant)
            return out

    model, x = Saving(), torch.randn(3, 8, requires_grad=True)
    value = Capture(model, ["inner.body.0"])(x)["inner.body.0"]
    assert value.requires_grad is not reentrant
    if not reentrant:
        value.sum().backward()
        torch.testing.assert_close(model.inner.body[0].bias.grad, torch.full((4,), 3.0))


def test_models_are_copied_and_saved_as_ever() -> None:
    model = Net(4)
    capture = Capture(model, ["body"])
    capture(torch.randn(3, 8))
    assert hooks(copy.deepcopy(model)) == 0
    assert pickle.loads(pickle.dumps(capture))(torch.randn(3, 8))["body"].shape == (3, 4)
