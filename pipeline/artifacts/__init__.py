"""What stages leave for others: how it is written, and how it is read back."""
