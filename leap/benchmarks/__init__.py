"""Benchmarks of whole models that need nothing but leap, torch and transformers."""
