"""A loaded transformers model: its tokens, its layers and its logits, the same for any architecture."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignez_gguf.engines.transformers.hub import require_findable
from alignez_gguf.engines.transformers.info import model_info
from alignez_gguf.errors import ModelFileError, require_extra

_MLP_NAMES = (
    "mlp",
    "block_sparse_moe",
    "feed_forward",
    "ffn",
    "moe",
    "shared_mlp",
    "residual_mlp",
    "experts",
)
"""The names that decoder layers give their MLP, or its parts."""

_CACHE_NAMES = ("cache", "past_key_values")
"""The names of the KV cache in forward passes: the first since transformers 5.24 (models/*/modeling_*.py)."""


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Rows of tokens, padded on the left so that they end together.

    Attributes:
        ids, positions: int64 [n_rows, width]; the position of each token in its row.
        mask: int64 [n_rows, width], 0 for padding.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor


class TorchModel:
    """The weights of a causal language model, and its tokenizer.

    Args:
        source: a directory or a hub id.
        dtype: the type of the weights: "auto" for that of the file, or "float32", "float16", "bfloat16".
        device_map: as transformers has it; "auto" takes the GPUs there are, or the CPU.

    Raises:
        ModelFileError: there is no such model, it is not complete, or its attention is not causal.
        MissingExtraError: transformers is missing.
    """

    def __init__(self, source: str | PathLike[str], *, dtype: str = "auto", device_map: Any = "auto") -> None:
        self.module, self.tokenizer, folder = _load(str(source), dtype, device_map)
        self.config = self.module.config.get_text_config()
        self.info = model_info(self.config, folder, str(source), self.module.dtype)
        self.n_ctx_train = int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)
        self._accepts = inspect.signature(type(self.module).forward).parameters
        self._cache_name = cache_name(self._accepts, self.config)
        self._bos = self.tokenizer.bos_token_id
        # Some tokenizers put a token at the end as well, which no prompt wants.
        self._adds_bos = self._bos is not None and self._bos in self.tokenizer.encode("")
        self._ends = _end_tokens(self.module.generation_config, self.tokenizer)
        if not is_causal(self.module):
            raise ModelFileError(
                f"{source} is an embedding model ({self.config.model_type}), whose tokens see what follows "
                "them; give a language model that writes text token by token"
            )

    @property
    def device(self) -> torch.device:
        """The device on which token ids are put in."""
        return torch.device(self.module.device)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers; what each puts out is the residual stream.

        Raises:
            ModelFileError: they cannot be identified.
        """
        return decoder_layers(self.module, self.config)

    @cached_property
    def mlps(self) -> list[nn.Module]:
        """The MLP, or the whole mixture, of each decoder layer.

        Raises:
            ModelFileError: they cannot be identified.
        """
        return layer_mlps(self.blocks, self.config)

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with the start token where the model wants one; parse special tokens.

        A text that brings the start token itself, as chat templates do, does not get a second one. Half
        characters (lone surrogates) become question marks.
        """
        text = text.encode("utf-8", errors="replace").decode()
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return [self._bos, *tokens] if self._adds_bos and tokens[:1] != [self._bos] else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def ends_text(self, token: int) -> bool:
        """Whether the model ends its text with this token."""
        return token in self._ends

    def padded(self, rows: Sequence[Sequence[int]]) -> PaddedBatch:
        """Pad rows of different lengths on the left."""
        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return PaddedBatch(ids.to(self.device), positions.to(self.device), mask.to(self.device))

    def logits(self, rows: PaddedBatch, n_last: int, cache: Any = None) -> tuple[Tensor, Any]:
        """The logits of the last tokens of each row, float32 [n_rows, n_last, n_vocab], and the cache behind.

        With a cache, `rows.mask` covers what it holds as well, and `ids` are what follows that.
        """
        arguments: dict[str, Any] = {self._cache_name: cache}
        if "position_ids" in self._accepts:
            arguments["position_ids"] = rows.positions
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = n_last
        output = self.module(
            input_ids=rows.ids,
            attention_mask=rows.mask,
            use_cache=True,
            **arguments,
        )
        return output.logits[:, -n_last:].float(), cache_in(output)

    def run(self, rows: Sequence[Sequence[int]]) -> None:
        """Compute rows of tokens for what hooks see, [n_rows, longest, n_embd]; without the head.

        They are padded on the right: no token attends to what follows it.
        """
        ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        self.module.base_model(input_ids=ids.to(self.device), use_cache=False)


def is_causal(module: Any) -> bool:
    """Whether the logits at a token are the same whatever follows it.

    transformers loads encoders such as BERT as causal language models too, and only warns of it.
    """
    tokens = torch.tensor([[2, 3], [2, 4]], device=module.device)
    with torch.inference_mode():
        first, second = module(input_ids=tokens, use_cache=False).logits[:, 0].float()
    rounding = max(1e-4, torch.finfo(module.dtype).eps)
    return bool((first - second).norm() <= rounding * first.norm())


def cache_name(parameters: Collection[str], config: Any) -> str:
    """Return the name that a forward pass with these parameters gives its KV cache.

    Raises:
        ModelFileError: it takes none.
    """
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    raise ModelFileError(
        f"a forward pass of {config.model_type!r} takes no KV cache; use a model of another architecture"
    )


def cache_in(given: Mapping[str, Any]) -> Any:
    """Return the KV cache among what a forward pass takes or returns, if there is one."""
    return next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)


def decoder_layers(model: nn.Module, config: Any) -> list[nn.Module]:
    """Return the decoder layers of a causal language model with this text config; see `TorchModel.blocks`."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    }
    outer = [
        module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
    ]
    if len(outer) != 1:
        raise ModelFileError(
            f"the decoder layers of the architecture {config.model_type!r} cannot be found; use a model of "
            "another architecture"
        )
    return list(outer[0])


def layer_mlps(blocks: Sequence[nn.Module], config: Any) -> list[nn.Module]:
    """The MLP, or the whole mixture, of each decoder layer; see `TorchModel.mlps`."""
    found = []
    for layer, block in enumerate(blocks):
        parts = [child for name, child in block.named_children() if name in _MLP_NAMES]
        if len(parts) != 1:
            raise ModelFileError(
                f"the MLP of layer {layer} of the architecture {config.model_type!r} cannot be found; use a "
                "model of another architecture"
            )
        found += parts
    return found


def hidden(output: Any, width: int, n_embd: int) -> Tensor:
    """The states [n_rows, width, n_embd] in what a module puts out; some also return a cache or a routing.

    Raises:
        ModelFileError: there are none of that shape.
    """
    states = output[0] if isinstance(output, tuple) else output
    if not isinstance(states, Tensor) or states.shape[-1] != n_embd or states.numel() % (width * n_embd):
        raise ModelFileError("a layer of this model has an output of an unexpected shape; use another model")
    return states.reshape(-1, width, n_embd)


def _load(source: str, dtype: str, device_map: Any) -> tuple[Any, Any, Path]:
    """The model in evaluation mode, its tokenizer, and the directory of its files."""
    with require_extra("transformers", "a model that is no GGUF file"):
        transformers: Any = import_module("transformers")
    require_findable(source)
    placed = device_map != "auto" or find_spec("accelerate") is not None
    try:
        folder = Path(transformers.utils.cached_file(source, "config.json")).parent
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        with _progress_only_on_a_terminal():
            module, report = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, device_map=device_map if placed else None, output_loading_info=True
            )
        if not placed:
            module = module.to(_best_device())
    except Exception as error:  # from_pretrained raises whatever its parts raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelFileError(
            f"cannot load {source} with transformers: {reason.rstrip('.')}; give a directory or hub id of a "
            "causal language model"
        ) from error
    if report["missing_keys"]:
        raise ModelFileError(
            f"{source} lacks the weights {min(report['missing_keys'])} and {len(report['missing_keys']) - 1} "
            "others; download the model again"
        )
    return module.eval().requires_grad_(False), tokenizer, folder


@contextmanager
def _progress_only_on_a_terminal() -> Iterator[None]:
    logging: Any = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    given = getattr(generation_config, "eos_token_id", None)
    ends = given if isinstance(given, list) else [given]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)
