"""Measuring a model: perplexity, zero-shot accuracy through lm-eval, and paired differences between two variants.

Nothing is re-exported here: lm-eval takes seconds to import, and who wants only the perplexity shall not wait for it.
"""
