"""One figure a file. A function returns ``None`` when there is nothing to show."""
