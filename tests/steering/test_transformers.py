"""The oracle is a full forward pass without a cache, edited by hooks of the test's own at given positions."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alignez_gguf import steer_transformers
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit, apply_to_block, apply_to_mlp
from alignez_gguf.control.gate import Gate
from alignez_gguf.errors import ControlFileError, SteeringError
from tests.models import TinyModel, tiny_model

PROMPT = torch.tensor([[5, 9, 14, 3, 77, 21, 8]])
N_PROMPT = PROMPT.shape[1]
N_NEW = 6
POSITIONS = {
    "generation": range(N_PROMPT - 1, 99),
    "first:2": range(N_PROMPT - 1, N_PROMPT + 1),
    "all": range(99),
}


def control_for(tiny: TinyModel, seed: int = 0) -> ControlFile:
    info = ModelInfo.from_gguf(tiny.gguf)
    normal = np.random.default_rng(seed).standard_normal
    edits = {
        0: LayerEdit(remove=normal((2, info.n_embd)), add=normal(info.n_embd)),
        1: LayerEdit.about(normal((2, info.n_embd)), normal(info.n_embd), 0.5),
        2: LayerEdit(remove=normal(info.n_embd)),
    }
    return ControlFile(info, edits)


def expected_logits(
    tiny: TinyModel, tokens: Tensor, control: ControlFile, strength: float, steered: range
) -> Tensor:
    """The logits of all tokens, [n_tokens, n_vocab]."""
    return nested_logits(tiny, tokens, [(control, strength, steered)])


def nested_logits(
    tiny: TinyModel, tokens: Tensor, nested: Sequence[tuple[ControlFile, float, range]]
) -> Tensor:
    """The same under several controls, each hooked after the one before it."""
    with ExitStack() as hooks, torch.inference_mode():
        for control, strength, steered in nested:
            chosen = [position in steered for position in range(tokens.shape[1])]
            for layer, edit in control.edits.items():
                if edit.edits_mlp:
                    hook(
                        hooks,
                        tiny.mlp_modules[layer],
                        chosen,
                        partial(apply_to_mlp, edit=edit, strength=strength),
                    )
                if edit.add is not None:
                    hook(
                        hooks,
                        tiny.blocks[layer],
                        chosen,
                        partial(apply_to_block, edit=edit, strength=strength),
                    )
        logits: Tensor = tiny.hf(tokens, use_cache=False).logits[0]
    return logits


def hook(hooks: ExitStack, module: nn.Module, chosen: list[bool], change: Callable[..., Any]) -> None:
    def forward_hook(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        edited = states.clone()
        edited[0, chosen] = torch.tensor(change(states[0, chosen].numpy()), dtype=torch.float32)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    hooks.callback(module.register_forward_hook(forward_hook).remove)


def generated(tiny: TinyModel) -> tuple[Tensor, Tensor]:
    """Greedy tokens behind the prompt, and their logits [N_NEW, n_vocab]."""
    with torch.inference_mode():
        out = tiny.hf.generate(  # type: ignore[operator]
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=N_NEW,
            min_new_tokens=N_NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
    return out.sequences, torch.cat(out.logits)


@pytest.mark.parametrize("scope", POSITIONS)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gemma3"])
def test_generation_is_that_of_hooks_at_the_steered_positions(architecture: str, scope: str) -> None:
    tiny = tiny_model(architecture)
    control = control_for(tiny)
    with steer_transformers(tiny.hf, control, strength=0.7, scope=scope):
        tokens, logits = generated(tiny)
    expected = expected_logits(tiny, tokens[:, :-1], control, 0.7, POSITIONS[scope])[N_PROMPT - 1 :]
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)
    plain = expected_logits(tiny, tokens[:, :-1], control, 0.0, range(0))[N_PROMPT - 1 :]
    assert (logits - plain).abs().max() > 0.05


def test_strength_zero_and_removal_give_the_original_model_bit_for_bit() -> None:
    tiny = tiny_model("llama")
    tokens, logits = generated(tiny)
    with steer_transformers(tiny.hf, control_for(tiny), strength=0) as steering:
        assert all(map(torch.equal, generated(tiny), (tokens, logits)))
        steering.strength = 1
        assert not torch.equal(generated(tiny)[1], logits)
    assert all(map(torch.equal, generated(tiny), (tokens, logits)))
    steering.remove()
    with pytest.raises(SteeringError, match="removed"):
        steering.strength = 0.5


def test_rows_padded_on_the_left_are_steered_where_their_prompt_ends() -> None:
    tiny = tiny_model("llama")
    control = control_for(tiny)
    short = PROMPT[:, 3:]
    padded = torch.cat([torch.zeros((1, 3), dtype=torch.int64), short], dim=1)
    mask = torch.tensor([[1] * N_PROMPT, [0] * 3 + [1] * (N_PROMPT - 3)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with steer_transformers(tiny.hf, control, scope="generation"), torch.inference_mode():
        logits = tiny.hf(torch.cat([PROMPT, padded]), attention_mask=mask, position_ids=positions).logits[
            :, -1
        ]
    for row, tokens in enumerate((PROMPT, short)):
        last = tokens.shape[1] - 1
        expected = expected_logits(tiny, tokens, control, 1.0, range(last, 99))[last]
        torch.testing.assert_close(logits[row], expected, atol=5e-5, rtol=1e-4)


def test_scope_of_the_control_is_the_default() -> None:
    tiny = tiny_model("llama")
    with steer_transformers(tiny.hf, replace(control_for(tiny), recipe={"scope": "first:2"})) as steering:
        assert str(steering.scope) == "first:2"
        steering.scope = "all"  # type: ignore[assignment]
        assert str(steering.scope) == "all"


@pytest.mark.parametrize("scopes", [("all", "generation"), ("generation", "first:2")])
def test_controls_act_in_the_order_of_attachment(scopes: tuple[str, str]) -> None:
    tiny = tiny_model("llama")
    nested = [(control_for(tiny, seed), 1 - 0.3 * seed, scope) for seed, scope in enumerate(scopes)]
    for order in (nested, nested[::-1]):
        with ExitStack() as steerings:
            for control, strength, scope in order:
                steerings.enter_context(steer_transformers(tiny.hf, control, strength=strength, scope=scope))
            tokens, logits = generated(tiny)
        expected, other = (
            nested_logits(tiny, tokens[:, :-1], [(c, s, POSITIONS[scope]) for c, s, scope in either])
            for either in (order, order[::-1])
        )
        torch.testing.assert_close(logits, expected[N_PROMPT - 1 :], atol=5e-5, rtol=1e-4)
        assert (other - expected).abs().max() > 1e-3


def test_controls_are_removed_in_any_order_and_leave_exactly_the_others() -> None:
    tiny = tiny_model("llama")
    _, plain = generated(tiny)
    attach = [
        partial(steer_transformers, tiny.hf, control_for(tiny, seed), strength=strength)
        for seed, strength in enumerate((1.0, 0.3))
    ]
    alone = []
    for only in attach:
        with only():
            alone.append(generated(tiny)[1])
    for first, left in ((0, 1), (1, 0)):
        handles = [each() for each in attach]
        assert not torch.equal(generated(tiny)[1], alone[left])
        handles[first].remove()
        assert torch.equal(generated(tiny)[1], alone[left])
        handles[left].remove()
        assert torch.equal(generated(tiny)[1], plain)


def test_cache_may_be_given_by_any_of_its_names_or_by_none() -> None:
    """transformers 5.24 renamed `past_key_values`, which it still takes, to `cache`."""
    tiny = tiny_model("llama")
    tokens = torch.cat([PROMPT, PROMPT[:, :1]], dim=1)
    expected = expected_logits(tiny, tokens, control_for(tiny), 1.0, range(N_PROMPT - 1, N_PROMPT))[-1]
    parameters = list(inspect.signature(tiny.hf.forward).parameters)
    place = next(parameters.index(name) for name in ("cache", "past_key_values") if name in parameters)
    with steer_transformers(tiny.hf, control_for(tiny), scope="first:1"), torch.inference_mode():
        for name in {"past_key_values", parameters[place]}:
            held = DynamicCache(config=tiny.hf.config)
            tiny.hf(PROMPT, **{name: held})
            found = tiny.hf(tokens[:, -1:], **{name: held}).logits[0, -1]
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
        held = DynamicCache(config=tiny.hf.config)
        tiny.hf(PROMPT, *[None] * (place - 1), held)
        found = tiny.hf(tokens[:, -1:], *[None] * (place - 1), held).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def test_layers_that_run_past_the_steering_are_an_error_and_not_unsteered() -> None:
    tiny = tiny_model("llama")
    wrapped = peft.get_peft_model(copy.deepcopy(tiny.hf), peft.LoraConfig(target_modules=["down_proj"]))
    with steer_transformers(tiny.hf, control_for(tiny)):
        with pytest.raises(SteeringError, match="without a call of the model"):
            tiny.hf.base_model(PROMPT)
        tiny.hf(PROMPT)
        with pytest.raises(SteeringError, match="without a call of the model"):
            tiny.hf.base_model(PROMPT)
    with pytest.raises(SteeringError, match=r"get_base_model\(\)"):
        steer_transformers(wrapped, control_for(tiny))
    with steer_transformers(wrapped.get_base_model(), control_for(tiny)):
        steered = wrapped.generate(input_ids=PROMPT, max_new_tokens=N_NEW, do_sample=False)
    with steer_transformers(tiny.hf, control_for(tiny)):
        expected = tiny.hf.generate(PROMPT, max_new_tokens=N_NEW, do_sample=False)  # type: ignore[operator]
    assert torch.equal(steered, expected)


def test_control_of_another_model_is_refused_and_leaves_no_hook(tmp_path: Path) -> None:
    tiny = tiny_model("llama")
    _, plain = generated(tiny)
    control_for(tiny_model("qwen3")).save(tmp_path / "other.gguf")
    with pytest.raises(ControlFileError):
        steer_transformers(tiny.hf, tmp_path / "other.gguf")
    with pytest.raises(SteeringError):
        steer_transformers(tiny.hf, control_for(tiny), strength=-1)
    assert torch.equal(generated(tiny)[1], plain)


def test_package_pulls_in_nothing_heavy() -> None:
    program = "import sys, alignez_gguf; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "fastapi", "llama_cpp", "numpy"}
    assert not heavy & set(done.stdout.split())


def test_control_with_a_gate_is_refused() -> None:
    tiny = tiny_model("llama")
    gate = Gate(torch.arange(3).numpy(), torch.ones(3).numpy(), 0.0)
    with pytest.raises(SteeringError, match="export with --gate off"):
        steer_transformers(tiny.hf, replace(control_for(tiny), gate=gate))
