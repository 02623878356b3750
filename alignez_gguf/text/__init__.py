"""What the text of an answer says by itself: whether it declines, insults, or repeats itself."""
