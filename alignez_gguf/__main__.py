"""The command line, as `python -m alignez_gguf`."""

from __future__ import annotations

from alignez_gguf.cli import main

if __name__ == "__main__":
    main(prog_name="alignez-gguf")
