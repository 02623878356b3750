"""Whether llama.cpp computes what the edits say, layer by layer, against numpy."""
