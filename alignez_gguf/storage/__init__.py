"""Files that outlive a crash: written whole or not at all, and checked when they are read."""
