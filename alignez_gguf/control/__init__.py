"""The control file and its parts: edits of layers, gate, scope, and the model that they are made for."""
