"""Runs the Hugging Face to GGUF converter of the llama.cpp source tree in a process of its own.

The converter needs the `gguf` package that lies beside it, which the test process may not import: it has
the released one. The worker process stays alive, so its imports are paid for once.
"""

from __future__ import annotations

import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch


def convert(llama_cpp: Path, model_directory: Path, gguf: Path) -> None:
    """Convert a saved transformers model, whose tokenizer is a byte-level BPE, to one GGUF file in F32."""
    _worker().submit(_convert, str(llama_cpp), str(model_directory), str(gguf)).result()


@cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_quiet)


def _quiet() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)


def _convert(llama_cpp: str, model_directory: str, gguf: str) -> None:
    if llama_cpp not in sys.path:
        sys.path[:0] = [llama_cpp, str(Path(llama_cpp) / "gguf-py")]
    from conversion import (  # type: ignore[import-not-found]
        ModelBase,
        ModelType,
        TextModel,
        get_model_architecture,
        get_model_class,
    )
    from gguf import LlamaFileType
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = Path(model_directory)
    hparams = ModelBase.load_hparams(source, is_mistral_format=False)
    model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    with (
        # By the model's type, the automatic class would add that family's special tokens.
        patch.object(AutoTokenizer, "from_pretrained", PreTrainedTokenizerFast.from_pretrained),
        # The converter knows released tokenizers only, by a hash.
        patch.object(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2"),
        # Several families insist on a sentencepiece file.
        patch.object(model_class, "set_vocab", TextModel._set_vocab_gpt2),
    ):
        model_class(source, LlamaFileType.ALL_F32, Path(gguf)).write()
