"""Steering a transformers model by a control file, through forward hooks: `steer` for fp16 weights."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import cache
from os import PathLike
from typing import Any

from torch import Tensor, nn

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import check_strength
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.transformers.hooks import TensorEdit, edit_columns, hook_edits
from alignez_gguf.engines.transformers.info import gguf_architecture
from alignez_gguf.engines.transformers.model import cache_in, cache_name, decoder_layers, layer_mlps
from alignez_gguf.errors import SteeringError
from alignez_gguf.steering.handle import ControlState, SteeringHandle


def steer_transformers(
    model: Any,
    control: ControlFile | str | PathLike[str],
    *,
    strength: float = 1.0,
    scope: str | Scope | None = None,
) -> TransformersSteering:
    """Steer a transformers causal language model until the returned handle is removed.

    At strength s the output of the MLP of an edited layer becomes x - s V^T V x, and s times the addition is
    added to the output of its block, both computed in float32; 0 is bit for bit the original model. Several
    controls nest as those of `steer` do: they act in the order of attachment, and are removed in any order.

    A forward pass over several tokens, or without a cache, is a prompt, whose last token is the first one
    of the scopes `generation` and `first:N`; each single token after it is a generated one. So `generate` has
    to use a cache, as it does by default, and rows of a batch have to be padded on the left.

    Args:
        model: a `PreTrainedModel`.
        control: a control file, or its path.
        strength: finite and not negative.
        scope: "generation" (the last prompt token and every generated one), "all" tokens, or "first:N";
            default: the one that the control was chosen for.

    Returns:
        A handle that is also a context manager.

    Raises:
        ControlFileError: the file is malformed or made for another model.
        ModelFileError: the layers of this architecture cannot be told, or it has no KV cache.
        SteeringError: the strength or the scope is not valid, the control has a gate, or the model is a PEFT
            model. While the handle is there, also whatever runs the layers without a call of the model.
    """
    if not isinstance(control, ControlFile):
        control = ControlFile.load(control)
    chosen = control.scope if scope is None else Scope.parse(scope)
    return TransformersSteering(model, control, check_strength(strength), chosen)


class TransformersSteering(SteeringHandle):
    """The handle of a control on a transformers model."""

    def __init__(self, model: Any, control: ControlFile, strength: float, scope: Scope) -> None:
        if hasattr(model, "get_base_model"):
            raise SteeringError(
                "a PEFT model runs its base model past the hooks; steer its get_base_model(), and run that"
            )
        if control.gate is not None:
            raise SteeringError(
                "the control has a gate, which transformers models are not asked; export with --gate off"
            )
        config = model.config.get_text_config()
        control.check_fits(
            ModelInfo(
                gguf_architecture(config.model_type), int(config.hidden_size), int(config.num_hidden_layers)
            )
        )
        super().__init__(control, ControlState(strength, scope))
        self._positions: tuple[int, int | None] = (0, 0)
        """First steered position and the end (exclusive, or none) of the present request."""
        self._first: int | None = None
        """The position at which the present forward pass begins; `None` outside of one."""
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        """The parameters of a forward pass, in the order in which they can be given without a name."""
        cache_name(self._parameters, config)
        blocks = decoder_layers(model, config)
        mlps = cache(lambda: layer_mlps(blocks, config))
        self._hooks = ExitStack()
        with ExitStack() as hooks:
            handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(model.register_forward_hook(self._end, always_call=True).remove)
            hook_edits(hooks, control.edits, mlps, blocks, self._edited)
            self._hooks = hooks.pop_all()
        self._attached = True

    def remove(self) -> None:
        """Give the original model back. Idempotent."""
        self._attached = False
        self._hooks.close()

    def _apply_strength(self) -> None:
        """Do nothing: every forward pass asks for the strength."""

    def _require_attached(self) -> None:
        if not self._attached:
            raise SteeringError("this steering was removed; call steer_transformers() again")

    def _begin(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """See where a forward pass begins, and whether a prompt does."""
        given = {**dict(zip(self._parameters, arguments, strict=False)), **named}
        ids = given.get("input_ids")
        tokens = given.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            raise SteeringError("a steered model needs `input_ids` or `inputs_embeds`; give one of them")
        cache, width = cache_in(given), tokens.shape[1]
        self._first = 0 if cache is None else int(cache.get_seq_length())
        if self._first == 0 or width > 1:
            self._positions = self.scope.positions(self._first + width)

    def _end(self, *_: object) -> None:
        self._first = None

    def _edited(self, states: Tensor, edit: TensorEdit) -> Tensor:
        """`states` [n_rows, width, n_embd] with the steered columns edited."""
        if self._first is None:
            raise SteeringError(
                "the layers run without a call of the model that was steered; call it, or its generate()"
            )
        begin, end = self._positions
        columns = slice(max(0, begin - self._first), None if end is None else max(0, end - self._first))
        if self.strength == 0 or states[:, columns].shape[1] == 0:
            return states
        return edit_columns(states, columns, edit, self.strength)
