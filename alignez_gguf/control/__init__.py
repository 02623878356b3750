"""What a control file holds: edits of layers, their gate and scope, and the model that they are made for."""
