"""Puts the edits of a control file into a model that somebody else holds."""
