"""The model as its files hold it: loading, and how large it is."""
