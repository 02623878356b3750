# The verbs of this repository. Each calls one script of tools/, which takes options of its own (--help).

PYTHON ?= python3

.PHONY: setup demo test build check

setup:  ## .venv with the dependencies and the patched llama-cpp-python
	$(PYTHON) tools/setup_environment.py

demo:  ## align a tiny model and show what changed
	$(PYTHON) tools/demo.py

test:  ## formatting, lint, types and all tests
	$(PYTHON) tools/test.py

build:  ## llama.cpp's own programs with the patches, into build/llama.cpp/bin
	$(PYTHON) tools/build_llama_tools.py

check:  ## those programs against `alignez-gguf generate`
	$(PYTHON) tools/check_llama_server.py
