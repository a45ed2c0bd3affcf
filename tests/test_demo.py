"""The demo, on sizes that take seconds: what it leaves behind, and that its checks can fail."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import fastkd
from fastkd import demo
from fastkd.demo import corpus, digits, memory, text
from fastkd.demo.language_model import LanguageModel
from fastkd.demo.settings import DigitsSettings, Settings, TextSettings
from fastkd.demo.terms import TERMS
from fastkd.distill import Distiller, metrics

TINY = Settings(
    seeds=(0, 1),
    digits=DigitsSettings(
        teacher_hidden=(64,), teacher_steps=100, teacher_lr=1e-2, student_steps=250, labels_per_class=3
    ),
    text=TextSettings(
        vocabulary=600,
        source_files=4,
        window=16,
        batch=4,
        teacher_width=16,
        student_width=8,
        teacher_steps=4,
        student_steps=5,
        evaluation_batches=2,
    ),
)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "demo.json").read_text())


def test_both_parts_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "not" / "there"
    assert demo.run(out, settings=TINY) == 0
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    report = report_of(out)
    assert report["versions"]["fastkd"] == fastkd.__version__
    assert report["settings"] == json.loads(json.dumps(asdict(TINY)))

    part = report["digits"]
    assert len(part["labels_alone"]) == len(part["distilled"]) == len(TINY.seeds)
    assert part["labels"] == 10 * TINY.digits.labels_per_class
    assert part["gain"] == pytest.approx(
        part["mean_and_spread"]["distilled"][0] - part["mean_and_spread"]["labels_alone"][0]
    )

    part = report["text"]
    assert part["vocabulary"] == TINY.text.vocabulary
    assert len(part["eager"]["losses"]) == len(part["fastkd"]["losses"]) == TINY.text.student_steps
    assert part["largest_difference"] <= TINY.text.tolerance
    assert part["ratio"]["loss_milliseconds"] == pytest.approx(
        part["eager"]["loss_milliseconds"] / part["fastkd"]["loss_milliseconds"]
    )
    assert all(math.isfinite(loss) and loss > 0 for loss in part["held_out"].values())

    printed = capsys.readouterr().out
    assert "fastkd.kd_loss" in printed
    assert "FAILED" not in printed


@pytest.mark.parametrize("part", demo.PARTS)
def test_one_part(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other part is neither run nor drawn."""
    other = {"digits": text, "text": digits}[part]
    monkeypatch.setattr(other, "run", lambda *_: pytest.fail("ran the other part"))
    assert demo.run(tmp_path, (part,), TINY) == 0
    assert demo.PARTS[1 - demo.PARTS.index(part)] not in report_of(tmp_path)
    assert (tmp_path / "demo.png").stat().st_size > 10_000


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def wrong_alpha(settings: TextSettings) -> Loss:
    return FASTKD_LOSS(replace(settings, alpha=1.1 * settings.alpha))


def not_a_number(settings: TextSettings) -> Loss:
    return lambda *arguments: FASTKD_LOSS(settings)(*arguments) * math.nan


def only_slightly_wrong(settings: TextSettings) -> Loss:
    return lambda *arguments: FASTKD_LOSS(settings)(*arguments) * (1 + 3 * settings.tolerance)


FASTKD_LOSS = text.fastkd_loss


@pytest.mark.parametrize("loss", [wrong_alpha, not_a_number, only_slightly_wrong])
def test_fails_when_the_curves_differ(
    loss: Callable[[TextSettings], Loss],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(text, "fastkd_loss", loss)
    assert demo.run(tmp_path, ("text",), TINY) == 1
    assert "FAILED text: the losses of eager and fastkd differ" in capsys.readouterr().out
    assert report_of(tmp_path)["text"]["eager"]["losses"]
    assert (tmp_path / "demo.png").exists()


WITH_HEADS = replace(TINY, text=replace(TINY.text, heads=True))


def test_a_third_student_without_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for, it takes the same curve; not asked for, nobody speaks of it."""
    assert demo.run(tmp_path, ("text",), TINY) == 0
    printed, plain = capsys.readouterr().out, report_of(tmp_path)["text"]
    assert "heads" not in printed
    assert [name for name in (*plain, *plain["held_out"], *plain["perplexity"]) if "heads" in name] == []
    assert demo.run(tmp_path, ("text",), WITH_HEADS) == 0
    printed, part = " ".join(capsys.readouterr().out.split()), report_of(tmp_path)["text"]
    assert "eager / heads" in printed
    assert "student, fastkd.kd_loss of heads" in printed
    assert "the three losses differ by" in printed
    assert part["heads"]["losses"] == pytest.approx(part["eager"]["losses"], rel=TINY.text.tolerance)
    assert part["held_out"]["student_heads"] == pytest.approx(part["held_out"]["student_eager"], rel=1e-2)
    assert part["eager"]["losses"] == pytest.approx(plain["eager"]["losses"], rel=1e-3)  # with the others in turns
    assert part["heads_ratio"]["step_milliseconds"] == pytest.approx(
        part["eager"]["step_milliseconds"] / part["heads"]["step_milliseconds"]
    )
    assert set(part["heads_ratio"]) == set(part["ratio"]) == set(plain["ratio"])


@pytest.mark.parametrize("change", [1.1, math.nan])
def test_fails_when_the_curve_of_heads_differs(
    change: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = text.heads_loss
    monkeypatch.setattr(text, "heads_loss", lambda settings: lambda *arguments: right(settings)(*arguments) * change)
    assert demo.run(tmp_path, ("text",), WITH_HEADS) == 1
    assert "FAILED text: the losses of eager, fastkd and heads differ" in capsys.readouterr().out


def test_heads_store_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(20).repeat(40)
    repeating = corpus.Corpus(vocabulary=20, train=tokens, held_out=tokens)
    settings = replace(TINY.text, vocabulary=20)
    way = text.Heads(text.heads_loss(settings))
    student = text.Student(settings, repeating, way, seed=0)
    teacher = text.Student(settings, repeating, way, seed=1).model
    batch = corpus.draw(tokens, settings.batch, settings.window, torch.Generator().manual_seed(0))
    stored, _ = text.Logits(text.eager_loss(settings)).backward(student.model, teacher, *batch)
    wanted = {name: x.grad.clone() for name, x in student.model.named_parameters()}
    student.model.zero_grad()
    monkeypatch.setattr(LanguageModel, "forward", lambda *_: pytest.fail("computed logits"))
    loss, seconds = way.backward(student.model, teacher, *batch)
    assert seconds > 0
    torch.testing.assert_close(loss, stored)
    for name, x in student.model.named_parameters():
        torch.testing.assert_close(x.grad, wanted[name], msg=name)


def test_students_of_one_term_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = replace(TINY, digits=replace(TINY.digits, terms=True, student_steps=50))
    demo.run(tmp_path, ("digits",), settings)
    part, printed = report_of(tmp_path)["digits"], capsys.readouterr().out
    assert list(part["terms"]) == list(TERMS)
    for name, accuracies in part["terms"].items():
        assert len(accuracies) == len(settings.seeds)
        assert statistics.fmean(accuracies) == pytest.approx(part["mean_and_spread"][name][0])
        assert f"student: {name}" in printed


@pytest.mark.parametrize("name", TERMS)
def test_a_term_brings_the_student_to_the_teachers_features(name: str, tmp_path: Path) -> None:
    data, student, teacher = digits.load(), digits.network((14,), seed=0), digits.network((64,), seed=5)
    images = TensorDataset(data.train[:300], data.train_target[:300])
    options = {"steps": 40, "batch_size": 64, "optimizer": partial(torch.optim.Adam, lr=1e-2), "log_every": 1}
    Distiller(student, teacher, TERMS[name]()).fit(images, out=tmp_path, **options)
    losses = [row["loss"] for row in metrics.rows(tmp_path, metrics.TRAIN)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_terms_are_not_trained_unless_asked_for(tmp_path: Path) -> None:
    demo.run(tmp_path, ("digits",), replace(TINY, seeds=(0,)))
    assert report_of(tmp_path)["digits"]["terms"] == {}


def test_fails_when_the_teacher_knows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = fastkd.kd_loss

    def noise(student: torch.Tensor, teacher: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return honest(student, 10 * torch.randn_like(teacher), *arguments, **options)

    monkeypatch.setattr(fastkd, "kd_loss", noise)
    assert demo.run(tmp_path, ("digits",), TINY) == 1
    assert "FAILED digits: distillation gains -" in capsys.readouterr().out


def test_five_seeds_unless_others_are_asked_for() -> None:
    """One seed has no spread, and any gain exceeds that: it would be luck, and the check of it no check."""
    assert len(set(Settings().seeds)) == 5


def test_students_are_distilled_on_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without a label too, with alpha 0: that is what the teacher is for."""
    honest, alphas = fastkd.kd_loss, {}

    def recording(student: torch.Tensor, teacher: torch.Tensor, *target: torch.Tensor, **options: Any) -> torch.Tensor:
        for row, alpha in zip(teacher.tolist(), options["alpha"].tolist(), strict=True):
            alphas[tuple(row)] = alpha  # the teacher's logits tell the inputs apart
        return honest(student, teacher, *target, **options)

    monkeypatch.setattr(fastkd, "kd_loss", recording)
    demo.run(tmp_path, ("digits",), replace(TINY, seeds=(0,)))
    labels = 10 * TINY.digits.labels_per_class
    known = [alpha for alpha in alphas.values() if alpha != 0]
    assert known == pytest.approx([TINY.digits.alpha] * labels)
    assert len(alphas) == report_of(tmp_path)["digits"]["train_rows"] > 10 * labels


def test_a_label_that_is_not_known_is_not_used() -> None:
    data, labelled = digits.load(), torch.arange(0, 60)
    knowledge, logits, rows = torch.randn(len(data.train), 10), torch.randn(100, 10), torch.arange(100)
    losses = []
    for change in (0, 1):
        target = data.train_target.clone()
        target[60:] = (target[60:] + change) % 10
        changed = replace(data, train_target=target)
        losses.append(digits.distillation_loss(TINY.digits, changed, labelled, knowledge)(logits, rows))
    assert torch.equal(*losses)


def test_one_thread_for_the_digits_alone() -> None:
    torch.set_num_threads(2)
    with digits.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_gain_has_to_exceed_the_spread() -> None:
    result = digits.DigitsResult(1, 1, 1, 1, 1, 100.0, labels_alone=[70.0, 90.0], distilled=[85.0, 95.0], seconds=0.0)
    assert result.problem() is not None
    assert replace(result, labels_alone=[79.0, 81.0], distilled=[89.0, 91.0]).problem() is None


def test_difference_is_relative_and_sees_the_compared_steps_alone() -> None:
    assert text.largest_difference([2.0, 1.0, 1.0], [2.0, 1.5, 9.0], steps=2) == pytest.approx(0.5)
    assert math.isnan(text.largest_difference([1.0, 1.0], [math.nan, 1.0], steps=2))


def test_eager_loss_is_what_pytorch_says_without_padding() -> None:
    settings = replace(TINY.text, temperature=2.0)
    student, teacher, target = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    log_q, log_p = ((logits / 2.0).flatten(0, 1).log_softmax(-1) for logits in (student, teacher))
    hard = torch.nn.functional.cross_entropy(student.flatten(0, 1), target.flatten())
    soft = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    expected = settings.alpha * hard + (1 - settings.alpha) * 4 * soft
    torch.testing.assert_close(text.eager_loss(settings)(student, teacher, target), expected)


def test_labels_are_shifted_and_padded() -> None:
    tokens = torch.arange(100)
    inputs, target = corpus.draw(tokens, batch=5, window=8, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == target.shape == (5, 8)
    assert torch.equal(target[:, :-1], inputs[:, 1:])
    assert (target[:, -1] == corpus.IGNORE).all()


def test_a_language_model_learns_what_repeats() -> None:
    tokens = torch.arange(20).repeat(40)
    settings = replace(TINY.text, vocabulary=20)
    repeating = corpus.Corpus(vocabulary=20, train=tokens, held_out=tokens)
    model = LanguageModel(repeating.log_frequency(), settings.window, settings.student_width)
    assert text.held_out_loss(model, settings, repeating) == pytest.approx(math.log(20), abs=0.5)
    for _ in text.train_on_labels(model, settings, repeating, steps=100, lr=3e-2, seed=0):
        pass
    assert text.held_out_loss(model, settings, repeating) < math.log(20) / 5


def test_a_vocabulary_that_the_texts_do_not_give() -> None:
    with pytest.raises(RuntimeError, match="byte-pair tokens, 1000000 are needed"):
        corpus.load(1_000_000, source_files=1)


def test_labelled_rows_are_balanced_and_differ_by_seed() -> None:
    target = digits.load().train_target
    first, second = (digits.choose_labelled(target, 6, seed) for seed in (0, 1))
    assert torch.bincount(target[first]).tolist() == [6] * 10
    assert len(first.unique()) == 60
    assert set(first.tolist()) != set(second.tolist())


def test_peak_sees_memory_that_is_gone_again() -> None:
    if not memory.available():
        pytest.skip("this system has no high-water mark that can be set back")
    size = 256 << 20
    peak = memory.Peak()
    block = bytearray(b"\1") * size
    del block
    assert peak.bytes() == pytest.approx(size, rel=0.2)
    assert memory.Peak().bytes() == pytest.approx(0, abs=size / 4)


def test_without_a_high_water_mark_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "such" / "file")
    memory.available.cache_clear()
    try:
        assert memory.Peak().bytes() is None
        assert demo.run(tmp_path, ("text",), TINY) == 0
    finally:
        memory.available.cache_clear()
    assert "not available" in capsys.readouterr().out
    assert report_of(tmp_path)["text"]["ratio"]["peak_megabytes"] is None
