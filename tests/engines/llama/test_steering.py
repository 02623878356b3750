"""The engine steers each request by its own strength; needs the patched runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.engines.base import Completion, GenerationRequest, Passage, Sampling
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.readout import Readout
from alignez_gguf.runtime.context import Context
from tests.models import TinyModel, tokenizer

SHARED = "Question: how do I bake a cake?\nAnswer: make a plan, work slowly and mind the oven.\n"
PROMPTS = [
    f"{SHARED}Question: how do I {action}?\nAnswer:" for action in ("pick a lock", "wash a dog", "sleep")
]
STRENGTHS = (0.0, 0.5, 1.0)
REQUESTS = [GenerationRequest(prompt, 7, strength) for prompt in PROMPTS for strength in STRENGTHS]
SAMPLING = Sampling(max_tokens=16, temperature=0.8)


def is_open(context: Context) -> bool:
    try:
        return bool(context.pointer)
    except ValueError:
        return False


def random_edits(seed: int = 0) -> Edits:
    normal = np.random.default_rng(seed).standard_normal
    return {
        layer: LayerEdit(remove=normal((4, 64)).astype(np.float32), add=(0.3 * normal(64)).astype(np.float32))
        for layer in range(3)
    }


def completed(engine: LlamaEngine, requests: list[GenerationRequest]) -> list[Completion]:
    found = dict(engine.generate(requests, SAMPLING))
    return [found[index] for index in range(len(found))]


def edited_logprobs(tiny: TinyModel, text: str, strength: float, first: int) -> np.ndarray:
    """PyTorch's log-probabilities after `text`, with the edit from position `first` on."""
    handles = []
    for layer, edit in random_edits().items():
        remove, add = torch.tensor(edit.remove), torch.tensor(edit.add)

        def on_mlp(_m, _i, x, v=remove):  # type: ignore[no-untyped-def]
            x = x.clone()
            x[:, first:] -= strength * (x[:, first:] @ v.T) @ v
            return x

        def on_block(_m, _i, h, a=add):  # type: ignore[no-untyped-def]
            h = h.clone()
            h[:, first:] += strength * a
            return h

        handles += [
            tiny.mlp_modules[layer].register_forward_hook(on_mlp),
            tiny.blocks[layer].register_forward_hook(on_block),
        ]
    logits = tiny.hf(torch.tensor([tokenizer().encode(text)])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("scope", ["generation", "all"])
def test_next_token_is_that_of_pytorch_edited_in_the_same_scope(
    engine: LlamaEngine, tiny: TinyModel, scope: str
) -> None:
    engine.set_edits(random_edits(), scope)
    for strength in (1.0, 0.5):
        for prompt, found in zip(PROMPTS, engine.next_token_logprobs(PROMPTS, strength), strict=True):
            first = 0 if scope == "all" else len(tokenizer().encode(prompt)) - 1
            # The engine's KV cache is in float16.
            np.testing.assert_allclose(found, edited_logprobs(tiny, prompt, strength, first), atol=2e-2)


@pytest.mark.parametrize("scope", ["generation", "all", "first:3"])
def test_requests_of_several_strengths_do_not_disturb_each_other(engine: LlamaEngine, scope: str) -> None:
    engine.set_edits(random_edits(), scope)
    together = completed(engine, REQUESTS)
    for request, expected in zip(REQUESTS, together, strict=True):
        engine.set_edits(random_edits(), scope)
        assert completed(engine, [request]) == [expected]
    assert len({found.text for found in together}) == len(REQUESTS)


def test_strength_zero_is_the_model_that_was_never_steered(engine: LlamaEngine) -> None:
    unsteered = [GenerationRequest(prompt, 7) for prompt in PROMPTS]
    before = completed(engine, unsteered)
    engine.set_edits(random_edits())
    completed(engine, REQUESTS)
    assert completed(engine, unsteered) == before


def test_former_edits_leave_no_trace(engine: LlamaEngine) -> None:
    engine.set_edits(random_edits(0), "all")
    expected = completed(engine, REQUESTS)
    engine.set_edits(random_edits(1), "all")
    assert completed(engine, REQUESTS) != expected
    engine.set_edits(random_edits(0), "all")
    assert completed(engine, REQUESTS) == expected


def test_activations_are_never_steered(engine: LlamaEngine) -> None:
    passages = [Passage(prompt, " and so on") for prompt in PROMPTS]
    readouts = [Readout("mlp", "mean"), Readout("residual", "mean")]
    before = list(engine.activations(passages, readouts))
    predicted = list(engine.response_logprobs(passages))
    engine.set_edits(random_edits(), "all")
    next(engine.next_token_logprobs(PROMPTS, 1.0))
    np.testing.assert_array_equal(list(engine.activations(passages, readouts)), before)
    next(engine.next_token_logprobs(PROMPTS, 1.0))
    assert list(engine.response_logprobs(passages)) == predicted


def test_one_context_at_a_time_is_open_and_all_of_them_have_the_edits(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Context] = []

    class Watched(Context):
        def __init__(self, *arguments: object, **options: object) -> None:
            assert not any(map(is_open, opened))
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            opened.append(self)

    for module in ("engine", "sequences"):
        monkeypatch.setattr(f"alignez_gguf.engines.llama.{module}.Context", Watched)
    engine.set_edits(random_edits(), "all")
    written, predicted = completed(engine, REQUESTS), list(engine.next_token_logprobs(PROMPTS, 1.0))
    read = list(engine.activations([Passage(PROMPTS[0])], [Readout("mlp", "last")]))
    assert completed(engine, REQUESTS) == written
    np.testing.assert_array_equal(list(engine.next_token_logprobs(PROMPTS, 1.0)), predicted)
    again = list(engine.activations([Passage(PROMPTS[0])], [Readout("mlp", "last")]))
    np.testing.assert_array_equal(again, read)
    assert len(opened) == 5


def test_what_is_read_while_a_batch_runs_leaves_it_alone(engine: LlamaEngine) -> None:
    engine.set_edits(random_edits(), "all")
    expected, predicted = completed(engine, REQUESTS), list(engine.next_token_logprobs(PROMPTS, 1.0))
    found = {}
    for index, completion in engine.generate(REQUESTS, SAMPLING):
        found[index] = completion
        np.testing.assert_array_equal(list(engine.next_token_logprobs(PROMPTS, 1.0)), predicted)
    assert [found[index] for index in range(len(found))] == expected
