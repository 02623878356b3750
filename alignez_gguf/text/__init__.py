"""Rules on the text of an answer alone: whether it declines, insults, or repeats itself."""
